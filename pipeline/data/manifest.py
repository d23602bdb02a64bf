"""The shard format: names, manifest and sample records, and their checks before a run. `data_prep` writes with it too.

    DIR/train/                   one shard set a split
      manifest.json              format, split, classes and what to show for them, every file's size and SHA-256
      train-000000.tar           a WebDataset tar: KEY.cls (the label in ASCII), then KEY.jpg or KEY.png; or KEY.events
      train-000000.idx           DALI's index of it (format v1.2)
      train-000000.npy           SAMPLE_DTYPE records in the tar's order

A sample's number is its position in the concatenation of the shards: shard 0's samples first. A set holds images or
recordings of events (pipeline/data/decode/events.py); of these height and width are the sensor's.
"""

import hashlib
import io
import json
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.config import OF_EVENTS, OF_IMAGES, DataConfig
from pipeline.data.decode.events import MAX_SIDE
from pipeline.data.remote import RETRIES, TIMEOUT_S, Remote, is_remote, join
from pipeline.errors import ConfigError, DataError, is_outage
from pipeline.run_dir import outages

FORMAT = "chispike-shards"
VERSION = 1
MANIFEST_NAME = "manifest.json"
KINDS = IMAGES, EVENTS = "images", "events"
"""What the samples of a set are."""
IMAGE_CHANNELS, EVENT_CHANNELS = 3, 2
"""Channels that the network gets: red, green and blue; the darker and the brighter events of a frame."""
TRAIN, EVALUATION = "train", "val"
"""Names of the splits, which are their folders."""
# Names become paths in the set and in the cache: they must not lead out of these folders, nor hold invalid bytes.
_NAME = re.compile(r"\w[\w.+=-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST = 1 << 53  # bytes or samples of a shard: sums of larger numbers could overflow int64

SAMPLE_DTYPE = np.dtype(
    [
        ("offset", "<u8"),  # of the image's bytes, or the events', in the tar
        ("length", "<u4"),  # of these, in bytes
        ("label", "<i4"),  # index into the manifest's classes
        ("height", "<u4"),  # in pixels, after EXIF rotation; of events the sensor's
        ("width", "<u4"),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One tar and the two files beside it; hashes are lower-case hex SHA-256."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str
    index_sha256: str
    samples_sha256: str

    @property
    def tar(self) -> str:
        return f"{self.name}.tar"

    @property
    def index(self) -> str:
        return f"{self.name}.idx"

    @property
    def samples(self) -> str:
        return f"{self.name}.npy"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensor:
    """The size of an event camera's pixel array."""

    height: int
    width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a shard set holds. `classes[label]` is the class's name."""

    split: str
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    display_names: tuple[str, ...] = ()
    """Names to show for the classes, in label order, where `classes` are codes (WNIDs); empty: show `classes`."""
    kind: str = IMAGES
    """What the samples are, one of `KINDS`. Not in the JSON of images."""
    sensor: Sensor | None = None
    """Of events, the sensor that all recordings are of; None where there are several, and of images."""
    handed: bool = False
    """Whether a mirrored sample may be of another class, as left and right hands are. In the JSON only where true."""

    @property
    def shown(self) -> tuple[str, ...]:
        """The name to show for each class."""
        return self.display_names or self.classes

    @property
    def channels(self) -> int:
        """Channels of the images or frames that the network gets."""
        return EVENT_CHANNELS if self.kind == EVENTS else IMAGE_CHANNELS

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def identity(self) -> str:
        """SHA-256 of the manifest's text without the shown names: sets of the same identity hold the same bytes."""
        return hashlib.sha256(replace(self, display_names=()).to_json().encode()).hexdigest()

    def to_json(self) -> str:
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
        if not self.display_names:
            del document["display_names"]
        if self.kind == IMAGES:
            del document["kind"]
        if self.sensor is None:
            del document["sensor"]
        if not self.handed:
            del document["handed"]
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Manifest":
        """The inverse of `to_json`; a `DataError` names `where` the text is from."""
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON ({error}); make the shards again with python -m data_prep") from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise DataError(f"{where} is not the manifest of a {FORMAT} set; point data.path at one")
        if document.get("version") != VERSION:
            raise DataError(f"{where} has version {document.get('version')}, this program reads version {VERSION}")
        try:
            manifest = cls(
                split=document["split"],
                classes=tuple(document["classes"]),
                shards=tuple(Shard(**shard) for shard in document["shards"]),
                display_names=tuple(document.get("display_names", ())),
                kind=document.get("kind", IMAGES),
                sensor=Sensor(**document["sensor"]) if "sensor" in document else None,
                handed=document.get("handed", False),
            )
        except (KeyError, TypeError) as error:
            raise DataError(f"{where} lacks or misspells a field ({error}); make the shards again") from None
        if not isinstance(document["classes"], list) or not all(map(_is_text, manifest.classes)):
            raise DataError(f"{where} gives classes that are not a list of names; make the shards again")
        if type(manifest.handed) is not bool:
            raise DataError(f"{where} gives handed={manifest.handed!r}, not true or false; make the shards again")
        if not _is_text(manifest.split):
            raise DataError(f"{where} gives split={manifest.split!r}, not a name; make the shards again")
        _check(manifest.shards, where)
        _check_kind(manifest, where)
        shown = manifest.display_names
        if shown and (len(shown) != len(manifest.classes) or not all(map(_is_text, shown))):
            raise DataError(
                f"{where} has {len(shown)} display_names for {len(manifest.classes)} classes, or not all are text; "
                "make the shards again, or leave the field out"
            )
        return manifest

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], *, retries: int = RETRIES, timeout_s: float = TIMEOUT_S
    ) -> "Manifest":
        """Reads the manifest of the set in `folder`, a path or a URL; `retries` and `timeout_s` are for a URL.

        Raises:
            ConfigError: there is no manifest, or the URL's protocol cannot be used.
            DataError: it is damaged, or access to a remote one is denied.
            StoreError: the store, or the folder's file system, does not answer.
        """
        path = join(folder, MANIFEST_NAME)
        try:
            if is_remote(folder):
                content = Remote(os.fspath(folder), retries=retries, timeout_s=timeout_s).read(MANIFEST_NAME)
            else:
                content = outages.outlast(Path(path).read_bytes, f"data.path: {folder}")
            text = content.decode("utf-8")
        except (FileNotFoundError, NotADirectoryError):
            message = f"no shard set in {folder} (no {MANIFEST_NAME}); make one with python -m data_prep"
            raise ConfigError(message) from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}); mend its rights or its disk") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text ({error.reason}); make the shards again") from None
        return cls.from_json(text, path)


def _is_text(value: object) -> bool:
    """Whether it can be written as UTF-8: JSON lets half a character pass, which `identity` could not hash."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _check_kind(manifest: Manifest, where: str) -> None:
    """Raises a `DataError` for samples of an unknown kind, or a sensor that no recording could be of."""
    if manifest.kind not in KINDS:
        raise DataError(f"{where} holds {manifest.kind!r}; this program reads {' and '.join(KINDS)}: use a newer one")
    if (sensor := manifest.sensor) is None:
        return
    sides = (sensor.height, sensor.width)
    if manifest.kind != EVENTS or not all(type(side) is int and 0 < side <= MAX_SIDE for side in sides):
        raise DataError(
            f"{where} gives {manifest.kind} a sensor of height {sides[0]!r} and width {sides[1]!r}; events have one of "
            f"1 to {MAX_SIDE} pixels a side, images none; make the shards again"
        )


def _check(shards: tuple[Shard, ...], where: str) -> None:
    """Raises a `DataError` for a dangerous name or impossible values: a manifest may come from anywhere."""
    for shard in shards:
        if not isinstance(shard.name, str) or not _NAME.fullmatch(shard.name):
            raise DataError(
                f"{where} names a shard {shard.name!r}; allowed are letters, digits and ._+=- after a first letter or "
                "digit, and no folder; make the shards again"
            )
        for field in ("sha256", "index_sha256", "samples_sha256"):
            got = getattr(shard, field)
            if not isinstance(got, str) or not _SHA256.fullmatch(got):
                raise DataError(
                    f"{where} gives {field}={got!r} for {shard.name}, which is not 64 lower-case hex digits; "
                    "make the shards again"
                )
        for field in ("num_samples", "num_bytes"):
            got = getattr(shard, field)
            if type(got) is not int or not 0 <= got <= _MOST:
                raise DataError(f"{where} gives {field}={got!r} for {shard.name}, not a count; make the shards again")
    (name, times), *_ = Counter(shard.name for shard in shards).most_common(1) or [("", 0)]
    if times > 1:
        raise DataError(f"{where} names the shard {name!r} {times} times; make the shards again")


def read_samples(folder: str | os.PathLike[str], shard: Shard) -> np.ndarray:
    """The `SAMPLE_DTYPE` records of a shard, `(shard.num_samples,)`, in memory. Not memory-mapped: if the file is cut
    while it is mapped, SIGBUS ends the process.

    Raises:
        DataError: the file cannot be read, its header or length is not what the manifest says, or a record lies outside
            of the tar.
        OSError: the file system is gone.
    """
    path = Path(folder) / shard.samples
    mend = "check the set with python -m data_prep verify"
    try:
        return samples_in(path.read_bytes(), shard)
    except OSError as error:
        if is_outage(error):
            raise
        raise DataError(f"{path} cannot be read ({error}); {mend}") from None
    except ValueError as error:
        raise DataError(f"{path} {error}; {mend}") from None


def samples_in(content: bytes, shard: Shard) -> np.ndarray:
    """The records in the bytes of a shard's file of records; a `ValueError` goes on after the file's name."""
    stream = io.BytesIO(content)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("its .npy format is not version 1.0")
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:  # broken bytes make the parser of a header raise any exception
        raise ValueError(f"cannot be read ({' '.join(str(error).split())[:200]})") from None
    if dtype != SAMPLE_DTYPE or shape != (shard.num_samples,):
        raise ValueError(f"holds {shape} of {dtype}, the manifest says {shard.num_samples} samples of {SAMPLE_DTYPE}")
    length, needed = len(content) - stream.tell(), shard.num_samples * SAMPLE_DTYPE.itemsize
    if length != needed:
        raise ValueError(f"holds {length} bytes of records, its header says {needed}")
    records = np.frombuffer(content, dtype=SAMPLE_DTYPE, offset=stream.tell())
    size, lengths = np.uint64(shard.num_bytes), records["length"].astype(np.uint64)
    outside = (lengths > size) | (records["offset"] > size - np.minimum(lengths, size))
    if outside.any():
        raise ValueError(
            f"puts sample {int(outside.argmax())} outside of {shard.tar}, which the manifest gives {shard.num_bytes} "
            "bytes"
        )
    return records


def load_manifest(data: DataConfig, split: str) -> Manifest:
    """The manifest of a split below `data.path`, local or remote."""
    return Manifest.load(join(data.path, split), retries=data.retries, timeout_s=data.timeout_s)


def check_kind(data: DataConfig, manifest: Manifest) -> None:
    """Refuses options that say nothing for the kind of samples in a set.

    Raises:
        ConfigError: an option of images is set for event recordings, or the other way round.
    """
    of_events = manifest.kind == EVENTS
    foreign = OF_IMAGES if of_events else OF_EVENTS
    for field in fields(data):
        got = getattr(data, field.name)
        if field.name in foreign and got != field.default:
            what, holds = ("images", "event recordings") if of_events else ("event recordings", "images")
            raise ConfigError(
                f"data.{field.name}={got!r} is for {what}, and {join(data.path, manifest.split)} holds {holds}; use "
                f"{field.default!r}, as without it"
            )


def check_flip(data: DataConfig, manifest: Manifest) -> None:
    """Raises a ConfigError where training samples would be mirrored though that may change their class."""
    if data.flip and manifest.handed:
        raise ConfigError(
            f"data.flip=True would give samples wrong labels: {join(data.path, manifest.split)} has classes that tell "
            "left from right, such as those of hands; use --data.flip false"
        )


def check_splits(data: DataConfig) -> Manifest:
    """Checks that both splits can be used; returns the training split's manifest.

    Files of local splits are checked here, those of remote splits when the cache downloads them.

    Raises:
        ConfigError: there is no such set, the classes or kinds of the two differ, an option is of another kind, or
            mirroring would change labels.
        DataError: a split has no samples or no classes, lacks a file, has a damaged file of records, or more labels
            out of range than `data.max_bad_ratio` allows.
    """
    train, evaluation = (load_manifest(data, split) for split in (TRAIN, EVALUATION))
    for split, manifest in ((TRAIN, train), (EVALUATION, evaluation)):
        where = join(data.path, split, MANIFEST_NAME)
        if not manifest.classes:
            raise DataError(f"{where} names no classes; make the shards again with python -m data_prep")
        if manifest.num_samples == 0:
            raise DataError(f"{where} has no samples; make the shards again with python -m data_prep")
    if train.kind != evaluation.kind:
        raise ConfigError(
            f"{data.path} holds {train.kind} to train on, and {evaluation.kind} to evaluate; make both splits of the "
            "same kind"
        )
    check_kind(data, train)
    check_flip(data, train)
    if train.classes != evaluation.classes:
        raise ConfigError(
            f"{join(data.path, EVALUATION)} has {differing(evaluation.classes, train.classes, 'train has')}; make both "
            "splits with the same classes in the same order"
        )
    if not is_remote(data.path):
        for split, manifest in ((TRAIN, train), (EVALUATION, evaluation)):
            folder = Path(join(data.path, split))
            outages.outlast(partial(_check_files, folder, manifest, data.max_bad_ratio), f"data.path: {folder}")
    return train


def differing(classes: tuple[str, ...], others: tuple[str, ...], others_have: str) -> str:
    """The first difference between a split's `classes` and `others`, in words."""
    if len(classes) != len(others):
        return f"{len(classes)} classes, but {others_have} {len(others)}"
    label = next(i for i, name in enumerate(classes) if name != others[i])
    return f"{classes[label]!r} as class {label}, where {others_have} {others[label]!r}"


def _check_files(folder: Path, manifest: Manifest, max_bad_ratio: float) -> None:
    try:
        there = {entry.name for entry in os.scandir(folder) if entry.is_file()}  # not a dangling link
    except OSError as error:
        if is_outage(error):
            raise
        raise ConfigError(f"{folder} cannot be listed ({error.strerror}); mend its rights or its disk") from None
    named = [name for shard in manifest.shards for name in (shard.tar, shard.index, shard.samples)]
    missing = [name for name in named if name not in there]
    if missing:
        more = f", and {len(missing) - 1} more," if len(missing) > 1 else ""
        raise DataError(
            f"{folder / missing[0]}{more} is missing, though {MANIFEST_NAME} names it; copy the set again, or make the "
            "shards again with python -m data_prep"
        )
    wrong, example = 0, ""
    for shard in manifest.shards:
        labels = read_samples(folder, shard)["label"]
        outside = (labels < 0) | (labels >= len(manifest.classes))
        if outside.any() and not wrong:
            row = int(outside.argmax())
            example = f"sample {row} of {shard.tar} has label {labels[row]}"
        wrong += int(np.count_nonzero(outside))
    if wrong > max_bad_ratio * manifest.num_samples:
        raise DataError(
            f"{folder}: {wrong} of {manifest.num_samples} samples have a label outside of 0 to "
            f"{len(manifest.classes) - 1}, more than data.max_bad_ratio={max_bad_ratio} allows ({example}); make the "
            "shards again with python -m data_prep"
        )
