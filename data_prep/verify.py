"""Checks a data set against its manifests: files, checksums, index, table, labels and, if asked, every pixel."""

import hashlib
import io
import mmap
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.images import RefusedError, inspect
from data_prep.pool import Event, run_tasks
from data_prep.progress import NOUNS, Progress
from data_prep.sources.tars import walk_tar
from data_prep.state import STATE_NAME, State, load_state
from data_prep.stores import Store
from data_prep.tar_format import IMAGE_AT, INDEX_VERSION, index_line
from pipeline.data.decode.events import EXTENSION
from pipeline.data.decode.events import decode as decode_events
from pipeline.data.manifest import EVENTS, IMAGES, MANIFEST_NAME, SAMPLE_DTYPE, Manifest, Sensor, Shard, samples_in
from pipeline.errors import ConfigError, DataError

_SPLITS = ("train", "val", "test")
_EXTENSIONS = {IMAGES: ("jpg", "png"), EVENTS: (EXTENSION,)}
_FAULTS_A_SHARD = 20
_REPORT_EVERY = 64
_LABEL_DIGITS = 9  # fit into int32


@dataclass(frozen=True, slots=True)
class _Checked:
    faults: list[str]
    keys: np.ndarray  # a hash of each sample's key, to find a key that two samples have


def find_splits(store: Store) -> dict[str, Manifest]:
    """Folder and manifest of each split in the store, or of the store itself; `ConfigError` where there is none."""
    found = {}
    for folder in ("", *_SPLITS):
        name = f"{folder}/{MANIFEST_NAME}".lstrip("/")
        text = store.read(name)
        if text is not None:
            found[folder] = Manifest.from_json(text.decode("utf-8", "replace"), f"{store.where}/{name}")
    if not found:
        message = f"no shard set in {store.where} (no {MANIFEST_NAME}, nor one in train/ or val/); "
        ended = store.read(STATE_NAME) is not None
        raise ConfigError(
            message + ("its run did not end: start it again" if ended else "make one with python -m data_prep")
        )
    return found


def verify(store: Store, *, decode: bool, num_workers: int, say: Callable[[str], None] = print) -> int:
    """Checks the data set in `store` and says every fault in a line; returns how many there are.

    Args:
        decode: decode every image in full, too. Events are always decoded.
        num_workers: processes, at least 1.
    """
    splits = find_splits(store)
    faults = _state_faults(store, splits)
    tasks = [(split, number) for split, manifest in splits.items() for number in range(len(manifest.shards))]
    num_samples, kind = sum(manifest.num_samples for manifest in splits.values()), next(iter(splits.values())).kind
    progress = Progress(num_samples, "verified", noun=NOUNS[kind])
    keys: dict[str, list[np.ndarray]] = {split: [] for split in splits}
    scratch = Path(tempfile.mkdtemp(prefix="data_prep-verify-")) if store.upload else store.work

    def work(task: tuple[str, int], report: Callable) -> _Checked:
        split, number = task
        return _check_shard(store, split, splits[split], number, decode, scratch, report)

    def on_event(event: Event) -> None:
        if event.done:
            faults.extend(event.value.faults)
            keys[event.task[0]].append(event.value.keys)
        elif event.value:
            progress.add(*event.value)
        progress.show()

    try:
        run_tasks(tasks, work, num_workers, on_event)
    finally:
        progress.close()
        if store.upload:
            shutil.rmtree(scratch, ignore_errors=True)
    for split, hashes in keys.items():
        together = np.concatenate([np.zeros(0, np.int64), *hashes])
        if len(np.unique(together)) != len(together):
            faults.append(f"{split or store.where}: two samples have the same key")
    for fault in sorted(faults):
        say(ascii(fault)[1:-1].replace("\\\\", "\\"))
    if not faults:
        depth = "every sample decoded" if decode else "checksums, index, tables and headers"
        say(f"{store.where} is whole: {progress.samples:,} samples in {len(tasks)} shards ({depth})")
    return len(faults)


def _state_faults(store: Store, splits: dict[str, Manifest]) -> list[str]:
    faults = []
    if store.read(STATE_NAME) is not None:
        state: State | None = load_state(store)
        if state is not None and not state.complete:
            faults.append(f"{STATE_NAME}: the run that makes this data set did not end; start it again")
        for split in sorted(set(state.plans if state else {}) - set(splits)):
            faults.append(f"{split}: {MANIFEST_NAME} is missing")
    for split, manifest in splits.items():
        listed = {name for shard in manifest.shards for name in (shard.tar, shard.index, shard.samples)}
        for name in sorted(store.sizes(split)):
            if name.endswith((".tar", ".idx", ".npy")) and name not in listed:
                faults.append(f"{split}/{name}: is not in the manifest".lstrip("/"))
    return faults


def _check_shard(
    store: Store, split: str, manifest: Manifest, number: int, decode: bool, scratch: Path, report: Callable
) -> _Checked:
    """The faults of one shard: the first _FAULTS_A_SHARD, and how many more."""
    shard = manifest.shards[number]
    faults: list[str] = []
    no_keys = np.zeros(0, np.int64)
    paths = {}
    for name, expected in (
        (shard.tar, shard.sha256),
        (shard.index, shard.index_sha256),
        (shard.samples, shard.samples_sha256),
    ):
        try:
            paths[name] = store.fetch(f"{split}/{name}".lstrip("/"), scratch)
            with open(paths[name], "rb") as file:
                got = _digest(file)
        except FileNotFoundError:
            faults.append(f"{name}: is missing")
            paths.pop(name, None)
        except DataError as error:
            faults.append(f"{name}: {error}")
        else:
            if got != expected:
                faults.append(f"{name}: SHA-256 is {got[:16]}…, the manifest says {expected[:16]}…")
    keys = no_keys
    if shard.tar in paths:
        num_bytes = paths[shard.tar].stat().st_size
        if num_bytes != shard.num_bytes:
            faults.append(f"{shard.tar}: {num_bytes} bytes, the manifest says {shard.num_bytes}")
        try:
            if not num_bytes:
                raise DataError("is empty")
            keys = _check_tar(paths, shard, manifest, decode, faults, report)
        except DataError as error:
            faults.append(f"{shard.tar}: {error}")
    if store.upload:
        for path in paths.values():
            path.unlink(missing_ok=True)
    if len(faults) > _FAULTS_A_SHARD:
        faults[_FAULTS_A_SHARD:] = [f"{shard.tar}: and {len(faults) - _FAULTS_A_SHARD} faults more"]
    return _Checked([f"{split}/{fault}".lstrip("/") for fault in faults], keys)


def _digest(file: io.BufferedReader) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _check_tar(
    paths: dict[str, Path], shard: Shard, manifest: Manifest, decode: bool, faults: list[str], report: Callable
) -> np.ndarray:
    """Compares the tar's samples with its index and table, and looks at the samples; returns hashes of the keys."""
    rows, lines, keys = [], [], []
    with open(paths[shard.tar], "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        tar = memoryview(mapped)
        try:
            members = iter(walk_tar(paths[shard.tar]))
            for label_file in members:
                image_file = next(members, None)
                key, _, extension = label_file.name.decode("utf-8", "replace").partition(".")
                image_key, _, image_extension = (
                    (image_file.name if image_file else b"").decode("utf-8", "replace").partition(".")
                )
                if (
                    image_file is None
                    or extension != "cls"
                    or image_key != key
                    or image_extension not in _EXTENSIONS[manifest.kind]
                ):
                    what = NOUNS[manifest.kind].removesuffix("s")
                    faults.append(f"{shard.tar}: {key}.{extension} is not followed by the {what} of its sample")
                    break
                text = bytes(tar[label_file.offset : label_file.offset + min(label_file.length, _LABEL_DIGITS + 1)])
                label = int(text) if text.isdigit() and len(text) <= _LABEL_DIGITS else -1
                if not 0 <= label < len(manifest.classes):
                    faults.append(
                        f"{shard.tar}: {key}: the label {text[:20]!r} is none of {len(manifest.classes)} classes"
                    )
                image = tar[image_file.offset : image_file.offset + image_file.length]
                look = _look_at_events if manifest.kind == EVENTS else partial(_look, decode)
                height, width = look(image, f"{shard.tar}: {key}.{image_extension}", faults)
                image.release()
                rows.append((image_file.offset, image_file.length, label, height, width))
                start = image_file.offset - IMAGE_AT
                lines.append(index_line(start, key, label_file.length, image_extension, image_file.length))
                keys.append(hash(key))
                if len(rows) % _REPORT_EVERY == 0:
                    report((_REPORT_EVERY, 0))
        finally:
            tar.release()
    report((len(rows) % _REPORT_EVERY, shard.num_bytes))
    if len(rows) != shard.num_samples:
        faults.append(f"{shard.tar}: {len(rows)} samples, the manifest says {shard.num_samples}")
    if (
        shard.index in paths
        and paths[shard.index].read_bytes() != f"{INDEX_VERSION} {len(lines)}\n{''.join(lines)}".encode()
    ):
        faults.append(f"{shard.index}: does not describe {shard.tar}")
    sensors = {Sensor(height=row[3], width=row[4]) for row in rows if row[3]}
    if manifest.sensor is not None and (others := sensors - {manifest.sensor}):
        faults.append(
            f"{shard.tar}: holds recordings of {others.pop()}, the manifest says all are of {manifest.sensor}"
        )
    if shard.samples in paths:
        _check_table(paths[shard.samples], np.array(rows, dtype=SAMPLE_DTYPE), shard, faults)
    return np.array(keys, dtype=np.int64)


def _look(decode: bool, image: memoryview, where: str, faults: list[str]) -> tuple[int, int]:
    try:
        found = inspect(image, decode=decode)
    except RefusedError as error:
        faults.append(f"{where}: {error}")
        return 0, 0
    if found.converted is not None:
        faults.append(f"{where}: decoders differ about it ({', '.join(found.kinds)}); pack the source again")
    return found.height, found.width


def _look_at_events(data: memoryview, where: str, faults: list[str]) -> tuple[int, int]:
    try:
        events = decode_events(data)
    except ValueError as error:
        faults.append(f"{where}: {error}")
        return 0, 0
    return events.height, events.width


def _check_table(path: Path, expected: np.ndarray, shard: Shard, faults: list[str]) -> None:
    try:
        table = samples_in(path.read_bytes(), shard)
    except (OSError, ValueError) as error:
        faults.append(f"{shard.samples}: {error}")
        return
    if table.shape != expected.shape:
        faults.append(f"{shard.samples}: {len(table)} samples, {shard.tar} holds {len(expected)}")
        return
    for field in SAMPLE_DTYPE.names or ():
        if (wrong := np.flatnonzero(table[field] != expected[field])).size:
            first = int(wrong[0])
            got, want = table[field][first], expected[field][first]
            faults.append(
                f"{shard.samples}: {field} of sample {first} is {got}, in {shard.tar} it is {want}; {wrong.size} such"
            )
