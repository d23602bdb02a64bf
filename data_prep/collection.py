"""What is packed: the samples of each split, in one canonical order, and how their bytes are read.

The index of a split is a few flat arrays, so that a million samples take some 60 MB and forked workers share them.
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from data_prep.images import Inspected
from pipeline.data.manifest import EVENTS, IMAGES
from pipeline.errors import DataError

Convert = Callable[[str, memoryview], Inspected]
"""Makes what is stored of a recording: its name in the source and its bytes → its events, as in a shard.

It raises `RefusedError` where the recording cannot be used. It runs in forked workers.
"""


class Reader(Protocol):
    """One place that holds samples: an archive, a folder. Used by forked workers; opens what it needs lazily."""

    def read_into(self, view: memoryview, offset: int, name: str) -> None:
        """Fills `view` with the bytes of the sample at `offset`.

        Raises:
            OSError: they cannot be read.
            RefusedError: the source itself says that the sample is damaged.
        """
        ...

    def prefetch(self, offset: int, length: int) -> None:
        """Tells the system that these bytes are wanted soon; does nothing where that has no meaning."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """A file that did not become a sample: its name in the source and why."""

    name: str
    reason: str


class NameTable:
    """Many names in one block of bytes: forked workers read it without copying it."""

    def __init__(self, names: list[bytes]) -> None:
        self.blob = b"".join(names)
        self.ends = np.cumsum([len(name) for name in names], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> str:
        start = int(self.ends[number - 1]) if number else 0
        return self.blob[start : int(self.ends[number])].decode("utf-8")


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The samples of one split, sorted by name."""

    name: str
    """Folder and file prefix of the shard set: train, val, test."""
    classes: tuple[str, ...]
    """Class names in label order."""
    names: NameTable
    """Names inside the source, unique, sorted as bytes."""
    labels: np.ndarray
    """int32, indices into `classes`."""
    places: np.ndarray
    """int32, indices into `readers`."""
    offsets: np.ndarray
    """int64, by which the reader finds the sample."""
    lengths: np.ndarray
    """int64, in bytes."""
    readers: tuple[Reader, ...]
    shown: tuple[str, ...] = ()
    """Display names of the classes, in label order, where they are not the names: the words of a WNID."""
    refusals: tuple[Refusal, ...] = ()
    """Files refused while indexing: links, devices, duplicates, names that are not UTF-8."""
    convert: Convert | None = None
    """Of recordings of events; None: the samples are images."""
    handed: bool = False
    """Whether a mirrored sample may be of another class, as left and right hands are."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def kind(self) -> str:
        """What the samples are, one of the manifest's `KINDS`."""
        return IMAGES if self.convert is None else EVENTS


@dataclass(slots=True)
class SplitBuilder:
    """Collects samples in any order; `build` sorts them and refuses duplicate names."""

    name: str
    readers: list[Reader] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    _names: list[bytes] = field(default_factory=list)
    _classes: list[str] = field(default_factory=list)
    _places: array = field(default_factory=lambda: array("i"))
    _offsets: array = field(default_factory=lambda: array("q"))
    _lengths: array = field(default_factory=lambda: array("q"))

    def __len__(self) -> int:
        return len(self._names)

    def add(self, *, name: str, label: str, place: int, offset: int, length: int) -> None:
        """Adds the sample `name` of the class named `label`, found at `offset` of `readers[place]`."""
        self._names.append(name.encode("utf-8"))
        self._classes.append(label)
        self._places.append(place)
        self._offsets.append(offset)
        self._lengths.append(length)

    def refuse(self, name: str, reason: str) -> None:
        """Notes a file that cannot become a sample."""
        self.refusals.append(Refusal(name=name, reason=reason))

    def name_of(self, number: int) -> bytes:
        """Name of the sample with this number; they count from 0, in the order of `add`."""
        return self._names[number]

    def class_of(self, number: int) -> str:
        """Class of the sample with this number."""
        return self._classes[number]

    def copy(self, number: int, other: "SplitBuilder") -> None:
        """Adds the sample to `other`, which has the same readers."""
        other.add(
            name=self._names[number].decode("utf-8"),
            label=self._classes[number],
            place=self._places[number],
            offset=self._offsets[number],
            length=self._lengths[number],
        )

    def class_names(self) -> set[str]:
        """Names of the classes that have a sample so far."""
        return set(self._classes)

    def build(
        self,
        classes: tuple[str, ...],
        display: dict[str, str] | None = None,
        shown: dict[str, str] | None = None,
        convert: Convert | None = None,
        handed: bool = False,
    ) -> Split:
        """The finished split.

        Args:
            classes: in label order.
            display: the names that the split gives them instead, by class.
            shown: display names, by class; a class without one has its name in the split.
            convert: of recordings of events.
            handed: whether a mirrored sample may be of another class.
        """
        if not self._names:
            what = "image" if convert is None else "recording"
            why = "; check the source's layout in docs/data_prep.md"
            if self.refusals:
                first, num = self.refusals[0], len(self.refusals)
                why = f": {num:,} {'are' if num > 1 else 'is'} refused, first {first.name} ({first.reason})"
            raise DataError(f"the split {self.name} holds no {what}{why}")
        order = sorted(range(len(self._names)), key=self._names.__getitem__)
        kept, refusals = [], list(self.refusals)
        for number in order:
            if kept and self._names[kept[-1]] == self._names[number]:
                name = self._names[number].decode()
                refusals.append(Refusal(name=name, reason="duplicate name: the first one is kept"))
            else:
                kept.append(number)
        label_of = {name: label for label, name in enumerate(classes)}
        rows = np.array(kept, dtype=np.int64)
        names = tuple((display or {}).get(name, name) for name in classes)
        return Split(
            name=self.name,
            classes=names,
            shown=tuple(shown.get(name, own) for name, own in zip(classes, names, strict=True)) if shown else (),
            names=NameTable([self._names[number] for number in kept]),
            labels=np.array([label_of[self._classes[number]] for number in kept], dtype=np.int32),
            places=np.array(self._places, dtype=np.int32)[rows],
            offsets=np.array(self._offsets, dtype=np.int64)[rows],
            lengths=np.array(self._lengths, dtype=np.int64)[rows],
            readers=tuple(self.readers),
            refusals=tuple(refusals),
            convert=convert,
            handed=handed,
        )
