"""Class folders, loose or in a tar, tar.gz or zip, with folders for the splits above them or without."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from data_prep.collection import Split, SplitBuilder
from data_prep.plan import shuffled
from data_prep.sources.files import existing, open_collection, path_fingerprint
from data_prep.sources.tars import Member
from pipeline.errors import DataError

_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_LAYOUT = "expected CLASS/IMAGE, or train/CLASS/IMAGE with val/ or test/ beside it"


class ImageFolder:
    """Images sorted into folders by class; labels follow the sorted names of the folders, as in torchvision.

    Args:
        path: a folder, or an archive of one.
        val_ratio: share of every class to hold out as val where the source has one split only.
        seed: draws what is held out.
    """

    def __init__(self, path: str, val_ratio: float, seed: int) -> None:
        self._path = existing(path, "imagefolder")
        self._val_ratio, self._seed = val_ratio, seed
        self.description = f"the image folder {path}"

    def fingerprint(self) -> list:
        return ["imagefolder", path_fingerprint(self._path), self._val_ratio]

    def index(self, work: Path, say: Callable[[str], None]) -> list[Split]:
        members, reader = open_collection(self._path, work, say)
        root, found, refused = _usable(members, say)
        layout = _Layout(root, found)
        builders = {name: SplitBuilder(name, [reader]) for name in layout.splits}
        for item, name, label, split in layout.samples(found):
            builders[split].add(name=name, label=label, place=0, offset=item.offset, length=item.length)
        for item in refused:
            name = item.name.decode("utf-8", "backslashreplace")
            first = next(iter(builders.values()))
            builders.get(layout.split_of(name), first).refuse(name, item.refused)
        if layout.outside:
            say(f"{len(layout.outside)} files outside of class folders are no samples: {layout.outside[0]}, …")
        classes = _classes(builders, layout, self._path)
        if list(builders) == ["train"] and self._val_ratio:
            builders = _held_out(builders["train"], self._val_ratio, self._seed)
        return [builder.build(classes) for builder in builders.values()]


def _usable(members: Iterable[Member], say: Callable) -> tuple[str, list[Member], list[Member]]:
    """The common folder above all files, the members that may be samples or folders of them, and the refused."""
    found, refused, hidden = [], [], 0
    for item in members:
        parts = item.name.split(b"/")
        if any(part.startswith(b".") and part not in (b".", b"..") for part in parts) or b"__MACOSX" in parts:
            hidden += not item.folder
        elif item.refused:
            refused.append(item)
        elif item.name:
            found.append(item)
    if hidden:
        say(f"{hidden} hidden files (names that start with a dot, __MACOSX) are no samples")
    root = ""
    while True:
        names = [item.name.decode() for item in found if not item.folder and item.name.startswith(root.encode())]
        inner = [name[len(root) :] for name in names if "/" in name[len(root) :]]
        tops = {name.split("/", 1)[0] for name in inner}
        # The only folder, with folders in it: a wrapper, unless it is a split itself. Lists and notes may lie beside.
        if len(tops) != 1 or tops & set(_SPLITS) or not any(name.count("/") > 1 for name in inner):
            return root, found, refused
        root += f"{tops.pop()}/"


class _Layout:
    """Tells split and class from a path below the root."""

    def __init__(self, root: str, found: list[Member]) -> None:
        self._root = root
        tops = {
            item.name.decode("utf-8", "replace")[len(root) :].split("/", 1)[0] for item in found if self._deep(item)
        }
        self._splits = {top: _SPLITS[top] for top in sorted(tops) if top in _SPLITS}
        if "val" not in self._splits.values() and "test" in self._splits:
            self._splits["test"] = "val"  # what is there to evaluate on takes the name that training looks for
        self.splits = sorted(set(self._splits.values()), key=("train", "val", "test").index) or ["train"]
        self.outside: list[str] = []
        self.folders: dict[str, set[str]] = {split: set() for split in self.splits}
        for item in found:
            if item.folder and (place := self._place(item.name.decode("utf-8", "replace") + "/")):
                self.folders[place[0]].add(place[1])

    def _deep(self, item: Member) -> bool:
        name = item.name.decode("utf-8", "replace")
        return name.startswith(self._root) and (item.folder or "/" in name[len(self._root) :])

    def _place(self, name: str) -> tuple[str, str, str] | None:
        """Split, class, and name below the split; None outside of class folders."""
        if not name.startswith(self._root):
            return None
        rest, split = name[len(self._root) :], "train"
        if self._splits:
            top, _, rest = rest.partition("/")
            if top not in self._splits:
                return None
            split = self._splits[top]
        label, slash, _ = rest.partition("/")
        return (split, label, rest) if slash and label else None

    def split_of(self, name: str) -> str:
        place = self._place(name)
        return place[0] if place else ""

    def samples(self, found: list[Member]):
        for item in found:
            if item.folder:
                continue
            name = item.name.decode()
            place = self._place(name)
            if place is None:
                self.outside.append(name)
            else:
                yield item, name, sys.intern(place[1]), place[0]


def _classes(builders: dict[str, SplitBuilder], layout: _Layout, path: Path) -> tuple[str, ...]:
    for split, builder in builders.items():
        if not len(builder):
            raise DataError(f"{path}: the split {split} holds no image in a class folder; {_LAYOUT}")
        if empty := layout.folders[split] - builder.class_names():
            raise DataError(f"{path}: the class folder {min(empty)} of {split} is empty; fill it or remove it")
    first, *others = builders.values()
    classes = first.class_names()
    for other in others:
        if extra := other.class_names() - classes:
            raise DataError(f"{path}: {other.name} has the class {min(extra)}, which {first.name} has not; {_LAYOUT}")
    return tuple(sorted(classes))


def _held_out(train: SplitBuilder, ratio: float, seed: int) -> dict[str, SplitBuilder]:
    """Moves `ratio` of every class of `train` to val."""
    by_class: dict[str, list[int]] = {}
    for number in sorted(range(len(train)), key=train.name_of):
        by_class.setdefault(train.class_of(number), []).append(number)
    builders = {
        "train": SplitBuilder("train", train.readers, train.refusals),
        "val": SplitBuilder("val", train.readers),
    }
    for label in sorted(by_class):
        numbers = by_class[label]
        num_val = round(ratio * len(numbers))
        for place, drawn in enumerate(shuffled(len(numbers), seed)):
            train.copy(numbers[drawn], builders["val" if place < num_val else "train"])
    return builders
