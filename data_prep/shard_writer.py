"""Writes one shard, start to end, in one process: tar, DALI index, sample table, and the record that says it is done.

Every file is written under a temporary name, flushed to disk and renamed; the record comes last. So a shard with a
record is whole, whatever killed the process that wrote it.
"""

import errno
import hashlib
import io
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np

from data_prep.collection import Refusal, Split
from data_prep.images import MAX_IMAGE_BYTES, RefusedError, inspect
from data_prep.plan import Options, Plan
from data_prep.sources.tars import members_inside
from data_prep.tar_format import BLOCK, IMAGE_AT, INDEX_VERSION, HeaderMaker, end_of_tar, index_line, padded, sample_key
from pipeline.data.manifest import SAMPLE_DTYPE, Shard
from pipeline.errors import DataError
from pipeline.run_dir import atomic

RECORDS = ".done"
_BUFFER = 4 << 20
_READ_AHEAD = 16  # samples announced to the system before they are read
_REPORT_EVERY_S = 0.2

ReportProgress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A finished shard: its entry in the manifest, and what was refused, counted and warned of."""

    shard: Shard
    refusals: tuple[Refusal, ...]
    kinds: dict[str, int]
    warnings: dict[str, tuple[int, str, int]] = field(default_factory=dict)
    """What was warned of in samples that are kept: of how many, the name of the first, and of how many events."""
    sensors: tuple[tuple[int, int], ...] = ()
    """Of recordings of events: height and width of each sensor, at most two, as then there is none common to all."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Record":
        document = json.loads(text)
        # Records of earlier versions do not say of how many events a warning is.
        warnings = {
            text: (count, first, num_events[0] if num_events else 0)
            for text, (count, first, *num_events) in document.get("warnings", {}).items()
        }
        return cls(
            shard=Shard(**document["shard"]),
            refusals=tuple(Refusal(**refusal) for refusal in document["refusals"]),
            kinds=document["kinds"],
            warnings=warnings,
            sensors=tuple((height, width) for height, width in document.get("sensors", ())),
        )


def shard_name(split: str, number: int) -> str:
    """The name that a shard's files share."""
    return f"{split}-{number:06d}"


class _TarStream:
    """Appends samples to a tar through one buffer, which source bytes are read into directly."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._digest = hashlib.sha256()
        self._buffer = memoryview(bytearray(_BUFFER))
        self._used = 0
        self._flushed = 0
        self._header = HeaderMaker()

    @property
    def position(self) -> int:
        """Bytes of the tar so far."""
        return self._flushed + self._used

    def reserve(self, length: int) -> memoryview:
        """Room for the next sample's image; `commit` then appends what was put there."""
        need = IMAGE_AT + padded(length)
        if self._used + need > len(self._buffer):
            self.flush()
        if need > len(self._buffer):
            self._buffer = memoryview(bytearray(need))
        start = self._used + IMAGE_AT
        return self._buffer[start : start + length]

    def commit(self, key: str, label: bytes, extension: str, length: int) -> None:
        """Appends the sample whose image lies in the reserved room."""
        start, buffer = self._used, self._buffer
        buffer[start : start + BLOCK] = self._header(f"{key}.cls".encode(), len(label))
        buffer[start + BLOCK : start + 2 * BLOCK] = label.ljust(BLOCK, b"\0")
        buffer[start + 2 * BLOCK : start + IMAGE_AT] = self._header(f"{key}.{extension}".encode(), length)
        end = start + IMAGE_AT + length
        self._used = start + IMAGE_AT + padded(length)
        buffer[end : self._used] = bytes(self._used - end)

    def flush(self) -> None:
        block = self._buffer[: self._used]
        self._digest.update(block)
        while block:
            block = block[os.write(self._file, block) :]
        # Starts writing to the disk now, so that finish() does not wait for all of it at once.
        os.posix_fadvise(self._file, self._flushed, self._used, os.POSIX_FADV_DONTNEED)
        self._flushed += self._used
        self._used = 0

    def finish(self) -> str:
        """Closes the tar, waits until the disk has it, and returns its SHA-256."""
        closing = end_of_tar(self.position)
        self.flush()
        self._buffer[: len(closing)] = closing
        self._used = len(closing)
        self.flush()
        os.fsync(self._file)
        return self._digest.hexdigest()

    def close(self) -> None:
        os.close(self._file)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Content:
    rows: np.ndarray
    index: bytes
    refusals: tuple[Refusal, ...]
    kinds: Counter
    warnings: dict[str, tuple[int, str, int]]


def _write_samples(
    stream: _TarStream, split: Split, plan: Plan, number: int, options: Options, report: ReportProgress
) -> _Content:
    """Streams the samples of shard `number` into `stream`."""
    first, last = int(plan.bounds[number]), int(plan.bounds[number + 1])
    rows, lines, refusals, kinds, warnings = [], [], [], Counter(), {}
    num_images = num_bytes = 0
    reported = time.monotonic()
    for position in range(first, last):
        ahead = position + _READ_AHEAD
        if ahead < last:
            later = int(plan.order[ahead])
            split.readers[split.places[later]].prefetch(int(split.offsets[later]), int(split.lengths[later]))
        source = int(plan.order[position])
        name, label = split.names[source], int(split.labels[source])
        key = sample_key(position, name)
        start = stream.position
        length, room = int(split.lengths[source]), memoryview(b"")
        try:
            if length > MAX_IMAGE_BYTES:
                mend = "" if split.convert is None else "; cut the recording into shorter ones"
                raise RefusedError(f"{length} bytes, more than the {MAX_IMAGE_BYTES} that a sample may have{mend}")
            room = stream.reserve(length)
            start = stream.position
            split.readers[split.places[source]].read_into(room, int(split.offsets[source]), name)
            if split.convert is None:
                found = inspect(room, decode=options.decode, resize=options.resize, quality=options.quality)
            else:
                found = split.convert(name, room)
            # A file that is kept has its end where it should be; of a converted one this is not known.
            if found.converted is not None and (swallowed := members_inside(room)):
                raise RefusedError(swallowed)
        except RefusedError as error:
            refusals.append(Refusal(name=name, reason=_reason(error, room)))
            kinds["refused"] += 1
        else:
            if found.converted is not None:
                length = len(found.converted)
                stream.reserve(length)[:] = found.converted
                start = stream.position
            text = b"%d" % label
            stream.commit(key, text, found.extension, length)
            lines.append(index_line(start, key, len(text), found.extension, length))
            rows.append((start + IMAGE_AT, length, label, found.height, found.width))
            kinds.update(found.kinds)
            for text, num in zip_longest(found.warnings, found.warned_events, fillvalue=0):
                count, first, num_events = warnings.get(text, (0, name, 0))
                warnings[text] = (count + 1, first, num_events + num)
        num_images, num_bytes = num_images + 1, num_bytes + length
        if time.monotonic() - reported > _REPORT_EVERY_S:
            report(num_images, num_bytes)
            num_images, num_bytes, reported = 0, 0, time.monotonic()
    report(num_images, num_bytes)
    index = f"{INDEX_VERSION} {len(lines)}\n" + "".join(lines)
    return _Content(
        rows=np.array(rows, dtype=SAMPLE_DTYPE),
        index=index.encode(),
        refusals=tuple(refusals),
        kinds=kinds,
        warnings=warnings,
    )


def _reason(error: RefusedError, room: memoryview) -> str:
    swallowed = members_inside(room)
    return f"{error}; {swallowed}" if swallowed and swallowed != str(error) else str(error)


def write_shard(
    split: Split, plan: Plan, number: int, options: Options, folder: Path, report: ReportProgress
) -> Record:
    """Writes shard `number` of `plan` into `folder`, and its record into `folder/.done`; returns the record.

    Args:
        report: called regularly with the images and bytes done since the last call.

    Raises:
        DataError: a source cannot be read, or the disk is full. Nothing is left under a final name.
    """
    name = shard_name(split.name, number)
    temporary = atomic.temporary(folder / f"{name}.tar")
    stream = _TarStream(temporary)
    try:
        content = _write_samples(stream, split, plan, number, options, report)
        tar_sha256 = stream.finish()
        num_bytes = stream.position
    finally:
        stream.close()
    table = io.BytesIO()
    np.save(table, content.rows, allow_pickle=False)
    shard = Shard(
        name=name,
        num_samples=len(content.rows),
        num_bytes=num_bytes,
        sha256=tar_sha256,
        index_sha256=hashlib.sha256(content.index).hexdigest(),
        samples_sha256=hashlib.sha256(table.getvalue()).hexdigest(),
    )
    if shard.num_samples:
        atomic.write(folder / shard.index, content.index, sync=True)
        atomic.write(folder / shard.samples, table.getvalue(), sync=True)
        os.replace(temporary, folder / shard.tar)
        atomic.flush(folder)
    else:  # all refused: an empty tar would only trouble its readers
        temporary.unlink()
    kinds, warnings = dict(sorted(content.kinds.items())), dict(sorted(content.warnings.items()))
    sizes = sorted({(int(row["height"]), int(row["width"])) for row in content.rows}) if split.convert else ()
    record = Record(shard=shard, refusals=content.refusals, kinds=kinds, warnings=warnings, sensors=tuple(sizes[:2]))
    atomic.write(folder / RECORDS / f"{name}.json", record.to_json(), sync=True)
    return record


def describe_os_error(error: OSError, folder: Path | str) -> DataError:
    """The one line that a failed read or write becomes."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(
            f"no space left for {folder} ({error.strerror}); finished shards are kept: free some space and run the "
            "same command again"
        )
    return DataError(f"{error.filename or folder}: {error.strerror or error}; mend that and run the same command again")
