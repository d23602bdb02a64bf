"""From a source to a finished data set: index, plan, shards on all cores, manifest last."""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from data_prep.collection import Refusal, Split
from data_prep.images import MAX_IMAGE_BYTES, RefusedError, inspect
from data_prep.plan import Options, Plan, make_plan, shuffled
from data_prep.pool import Event, run_tasks
from data_prep.progress import NOUNS, Progress, duration, size
from data_prep.shard_writer import RECORDS, Record, describe_os_error, shard_name, write_shard
from data_prep.state import State, finished_shards, forget, load_state, reads_anew, request_identity
from data_prep.stores import Store, clear_temporary, locked
from pipeline.data.manifest import EVENTS, MANIFEST_NAME, Manifest, Sensor
from pipeline.errors import DataError

QUARANTINE_NAME = "quarantine.jsonl"
_UPLOADS = 4
_TOLD_ALIKE = 20
"""Samples refused for one reason that are told by name each; of more, the first."""
_PROBES = 48
_WARNINGS_TOLD = 20
Say = Callable[[str], None]


class Source(Protocol):
    """Something that samples come from."""

    description: str
    """In words, for messages."""

    def fingerprint(self) -> list:
        """Names, sizes and times of the source's files: changes when they do, costs no reading."""
        ...

    def index(self, work: Path, say: Say) -> list[Split]:
        """Finds all samples. `work` is a local folder for what must be unpacked first."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class AllowedBad:
    """How many samples of a split may be refused: a count, or a share of the split."""

    count: int | None = None
    ratio: float = 0.001

    def limit(self, num_samples: int) -> int:
        return self.count if self.count is not None else int(self.ratio * num_samples)

    def __str__(self) -> str:
        return str(self.count) if self.count is not None else f"{self.ratio:.4g} of a split"


@dataclass(slots=True)
class _Job:
    split: Split
    plan: Plan
    records: dict[str, Record]

    @property
    def refusals(self) -> list[Refusal]:
        """Refused samples: first those refused while indexing, then the others in the order of the plan."""
        ordered = [self.records[name] for name in sorted(self.records)]
        return [*self.split.refusals, *(refusal for record in ordered for refusal in record.refusals)]


def prepare(
    source: Source, store: Store, options: Options, *, num_workers: int, allowed_bad: AllowedBad,
    reading: str = "", say: Say = print,
) -> bool:  # fmt: skip
    """Packs `source` into `store`; goes on where an earlier run of the same command ended.

    Args:
        source: what to pack.
        store: where to; see `make_store`.
        options: what decides the bytes of the output.
        num_workers: processes that write shards, at least 1.
        allowed_bad: samples that may be refused; with more, the data set is not finished.
        reading: options of how the source's files are read, in words; they are of the source's fingerprint too.
        say: called with each line of the summary.

    Returns:
        False where everything was complete already and nothing was written.

    Raises:
        ConfigError: the store holds something else, or another run writes to it.
        DataError: the source is unreadable or not what it should be, too many samples were refused, the disk is full.
    """
    request = request_identity(source.fingerprint(), options)
    with locked(store):
        state = load_state(store)
        if state is not None and state.complete and state.request == request and _is_whole(store, state):
            say(f"{store.where} is complete already ({_totals(state)}); nothing to do")
            return False
        try:
            _make(source, store, options, state, request, num_workers, allowed_bad, reading, say)
        except OSError as error:
            raise describe_os_error(error, store.where) from None
        finally:
            clear_temporary(store, ["", *(f"{split}{below}" for split in _folders(store) for below in ("", "/.done"))])
    return True


def _folders(store: Store) -> list[str]:
    return [path.name for path in store.work.iterdir() if path.is_dir()] if store.work.exists() else []


def _make(
    source: Source, store: Store, options: Options, state: State | None, request: str, num_workers: int,
    allowed_bad: AllowedBad, reading: str, say: Say,
) -> None:  # fmt: skip
    started = time.monotonic()
    say(f"reading the index of {source.description}")
    jobs = [_Job(split, _plan(split, options), {}) for split in source.index(store.work, say)]
    for job in jobs:
        say(_described(job.split))
    plans = {job.split.name: job.plan.identity for job in jobs}
    changed = state is not None and state.request != request
    if state is not None and reads_anew(store, state, plans, source.description, reading):
        say(f"the recordings are read with {reading} from now on: all shards are written again")
        for split in state.plans:
            for name in list(store.sizes(split)):
                store.remove(f"{split}/{name}")
    elif changed:
        say("the source's files changed since the last run (size or time): its shards are written again")
    for job in jobs:
        forget(store, job.split.name, records=changed or state is None)
        planned = {shard_name(job.split.name, number) for number in range(job.plan.num_shards)}
        records = finished_shards(store, job.split.name)
        job.records = {name: record for name, record in records.items() if name in planned}
    state = State(request, source.description, asdict(options), reading, plans)
    state.save(store)
    for job in jobs:  # not before: a folder in DIR without the state beside it is taken for another's
        (store.work / job.split.name / RECORDS).mkdir(parents=True, exist_ok=True)
    progress = _write_all(jobs, store, options, num_workers, say)
    last_line = progress.line()
    _finish(jobs, store, state, allowed_bad, say)
    total_s = time.monotonic() - started
    say(f"done in {duration(total_s)}, {duration(total_s - progress.elapsed_s)} of it before packing: {last_line}")


def _described(split: Split) -> str:
    """A line on what was found in a split. A split that was taken for a class shows here, before packing."""
    shown = split.shown or split.classes
    first = ", ".join(shown[:5]) + (", …" if len(shown) > 5 else "")
    present = np.count_nonzero(np.bincount(split.labels, minlength=len(shown)))
    lacking = "" if present == len(shown) else f" ({present:,} of them have {NOUNS[split.kind]})"
    return f"{split.name}: {len(split):,} {NOUNS[split.kind]}, {len(shown):,} classes{lacking}: {first}"


def _plan(split: Split, options: Options) -> Plan:
    is_stored = split.convert is None and not options.resize
    return make_plan(split, options, size_ratio=1.0 if is_stored else _size_ratio(split, options))


def _size_ratio(split: Split, options: Options) -> float:
    """Output bytes per source byte, measured on a few samples that the seed draws: the same in every run."""
    before = after = 0
    for source in shuffled(len(split), options.seed)[:_PROBES]:
        length = int(split.lengths[source])
        if length > MAX_IMAGE_BYTES:
            continue
        room = memoryview(bytearray(length))
        try:
            split.readers[split.places[source]].read_into(room, int(split.offsets[source]), split.names[source])
            if split.convert is None:
                found = inspect(room, decode=False, resize=options.resize, quality=options.quality)
            else:
                found = split.convert(split.names[source], room)
        except RefusedError:
            continue
        before, after = before + length, after + (length if found.converted is None else len(found.converted))
    return after / before if before else 1.0


def _write_all(jobs: list[_Job], store: Store, options: Options, num_workers: int, say: Say) -> Progress:
    """Writes every shard that has no record yet."""
    tasks = [
        (which, number)
        for which, job in enumerate(jobs)
        for number in range(job.plan.num_shards)
        if shard_name(job.split.name, number) not in job.records
    ]
    num_done = sum(len(job.records) for job in jobs)
    if num_done:
        say(f"{num_done} of {num_done + len(tasks)} shards are finished already and stay as they are")
    num_samples = sum(int(np.diff(jobs[which].plan.bounds)[number]) for which, number in tasks)
    progress = Progress(num_samples, "packed", noun=NOUNS[jobs[0].split.kind])
    uploads: set[Future] = set()

    def work(task: tuple[int, int], report: Callable) -> Record:
        which, number = task
        job = jobs[which]
        folder = store.work / job.split.name
        return write_shard(job.split, job.plan, number, options, folder, lambda *passed: report(passed))

    with ThreadPoolExecutor(_UPLOADS) as uploader:

        def on_event(event: Event) -> None:
            if event.done:
                job = jobs[event.task[0]]
                job.records[event.value.shard.name] = event.value
                if store.upload:
                    uploads.add(uploader.submit(store.publish, _files(job.split.name, event.value)))
            elif event.value:
                progress.add(*event.value)
            # Shards wait on the local disk for their upload. With more than a few, packing waits for the network.
            while len(uploads) > _UPLOADS:
                _settle(uploads)
            progress.show()

        try:
            run_tasks(tasks, work, num_workers, on_event)
            while uploads:
                _settle(uploads)
        finally:
            uploader.shutdown(cancel_futures=True)
            progress.close()
    return progress


def _settle(uploads: set[Future]) -> None:
    done, _ = wait(uploads, return_when=FIRST_COMPLETED)
    for future in done:
        uploads.remove(future)
        future.result()


def _files(split: str, record: Record) -> list[str]:
    shard = record.shard
    files = [shard.tar, shard.index, shard.samples] if shard.num_samples else []
    return [*(f"{split}/{name}" for name in files), f"{split}/{RECORDS}/{shard.name}.json"]


def _finish(jobs: list[_Job], store: Store, state: State, allowed_bad: AllowedBad, say: Say) -> None:
    """Writes quarantine lists, manifests and the complete state; `DataError` where too many samples were refused."""
    too_many = []
    for job in jobs:
        name, refusals = job.split.name, job.refusals
        lines = "".join(json.dumps(asdict(refusal), ensure_ascii=False) + "\n" for refusal in refusals)
        if refusals:
            store.write(f"{name}/{QUARANTINE_NAME}", lines.encode("utf-8", "backslashreplace"))
        else:
            store.remove(f"{name}/{QUARANTINE_NAME}")
        kinds: Counter = Counter()
        for record in job.records.values():
            kinds.update(record.kinds)
        kinds.pop("refused", None)
        num_in = len(job.plan.order) + len(job.split.refusals)
        num_out = sum(record.shard.num_samples for record in job.records.values())
        assert num_in == num_out + len(refusals), f"{name}: {num_in} samples in, {num_out} out, {len(refusals)} refused"
        state.counts[name] = {
            "in": num_in, "out": num_out, "refused": len(refusals), "kinds": dict(sorted(kinds.items())),
            "bytes": sum(record.shard.num_bytes for record in job.records.values() if record.shard.num_samples),
            "shards": sum(record.shard.num_samples > 0 for record in job.records.values()),
        }  # fmt: skip
        _summarise(state.counts[name], name, say)
        _tell_warnings(job, say)
        if len(refusals) > allowed_bad.limit(num_in) or not num_out:
            too_many.append((name, refusals, num_in))
    if too_many:
        _refuse_all(too_many, store, allowed_bad)
    for job in jobs:
        shards = tuple(job.records[name].shard for name in sorted(job.records) if job.records[name].shard.num_samples)
        split = job.split
        manifest = Manifest(
            split=split.name,
            classes=split.classes,
            shards=shards,
            display_names=split.shown,
            kind=split.kind,
            sensor=_common_sensor(job) if split.kind == EVENTS else None,
            handed=split.handed,
        )
        store.write(f"{job.split.name}/{MANIFEST_NAME}", manifest.to_json().encode())
    state.complete = True
    state.save(store)


def _common_sensor(job: _Job) -> Sensor | None:
    """The sensor of all recordings of a split, where it is one."""
    sizes = {size for record in job.records.values() for size in record.sensors}
    if len(sizes) != 1:
        return None
    height, width = sizes.pop()
    return Sensor(height=height, width=width)


def _refuse_all(too_many: list[tuple[str, list[Refusal], int]], store: Store, allowed_bad: AllowedBad) -> None:
    parts = []
    for name, refusals, num_in in too_many:
        alike: dict[str, list[str]] = {}
        for refusal in refusals:
            alike.setdefault(refusal.reason, []).append(refusal.name)
        for reason, names in alike.items():
            others = len(names) - 1 if len(names) > _TOLD_ALIKE else 0
            for one in names[: len(names) - others]:
                more = f" and {others:,} others" if others else ""
                sys.stderr.write(ascii(f"refused {name}: {one}{more}: {reason}")[1:-1] + "\n")
        parts.append(f"{len(refusals)} of {num_in} samples of {name}")
    raise DataError(
        f"refused {' and '.join(parts)}, more than --allow-bad={allowed_bad} allows; they are listed in "
        f"{store.where}/{too_many[0][0]}/{QUARANTINE_NAME}: mend the source, or run again with a larger --allow-bad "
        "(finished shards stay)"
    )


def _summarise(counts: dict, name: str, say: Say) -> None:
    kinds = ", ".join(f"{kind} {num:,}" for kind, num in counts["kinds"].items())
    say(
        f"{name}: {counts['in']:,} in = {counts['out']:,} out + {counts['refused']:,} refused; "
        f"{counts['shards']} shards, {size(counts['bytes'])}; {kinds}"
    )


def _tell_warnings(job: _Job, say: Say) -> None:
    """Says what is unusual in samples that are kept, or what the image library warned of, one line for each kind."""
    told: dict[str, tuple[int, str, int]] = {}
    for name in sorted(job.records):
        for text, (count, first, num_events) in job.records[name].warnings.items():
            earlier, first, earlier_events = told.get(text, (0, first, 0))
            told[text] = (earlier + count, first, earlier_events + num_events)
    for text, (count, first, num_events) in sorted(told.items())[:_WARNINGS_TOLD]:
        many = f" ({num_events:,} in all)" if num_events else ""
        say(f"{job.split.name}: {count:,} {NOUNS[job.split.kind]} that are kept, {first} the first: {text}{many}")
    if len(told) > _WARNINGS_TOLD:
        say(f"{job.split.name}: and {len(told) - _WARNINGS_TOLD} more kinds of warnings")


def _is_whole(store: Store, state: State) -> bool:
    for split in state.plans:
        text = store.read(f"{split}/{MANIFEST_NAME}")
        if text is None:
            return False
        manifest, sizes = (
            Manifest.from_json(text.decode(), f"{store.where}/{split}/{MANIFEST_NAME}"),
            store.sizes(split),
        )
        for shard in manifest.shards:
            if sizes.get(shard.tar) != shard.num_bytes or shard.index not in sizes or shard.samples not in sizes:
                return False
    return True


def _totals(state: State) -> str:
    return ", ".join(f"{name} {counts['out']:,} samples" for name, counts in state.counts.items())
