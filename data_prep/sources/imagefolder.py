"""Class folders, loose or in a tar, tar.gz or zip, with or without folders of splits above them."""

import hashlib
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from data_prep.collection import Convert, Reader, Refusal, Split, SplitBuilder
from data_prep.sources.files import ARCHIVE_KINDS, HIDDEN, PassedOver, existing, open_collection, path_fingerprint
from data_prep.sources.layout import LAYOUT, Layout, Tree, find_layout, is_in, join
from data_prep.sources.lists import Lists
from data_prep.sources.splits import SPLITS, split_of
from data_prep.sources.tars import Member
from pipeline.errors import DataError

_MOST_FOLDERS, _LONGEST_NAME = 256, 4096  # an archive may hold a path of a million folders


class ImageFolder:
    """Images sorted into folders by class; labels follow the sorted names of the folders, as in torchvision.

    Args:
        path: a folder, or an archive of one.
        val_ratio: share of every class to hold out as val where the source has one split only.
        seed: draws what is held out.
    """

    _wanted: frozenset[str] | None = None
    """Extensions of the samples; None: every file may be an image that is of no other known kind."""
    _noun = "images"

    def __init__(self, path: str, val_ratio: float, seed: int) -> None:
        self._path = existing(path, "imagefolder")
        self._val_ratio, self._seed = val_ratio, seed
        self.description = f"the image folder {path}"

    def fingerprint(self) -> list:
        return ["imagefolder", path_fingerprint(self._path), self._val_ratio]

    def index(self, work: Path, say: Callable[[str], None]) -> list[Split]:
        members, reader = open_collection(self._path, work, say)
        return self._index_members(members, reader, say)

    def _index_members(self, members: Iterable[Member], reader: Reader, say: Callable[[str], None]) -> list[Split]:
        lists = Lists(reader)
        found = _Found(members, lists, PassedOver(self._wanted, self._noun), say)
        try:
            layout = find_layout(found.tree, str(self._path))
        except DataError as error:
            raise DataError(f"{error}{found.why('')}") from None
        builders = {split: SplitBuilder(split, [reader]) for split in SPLITS if split in layout.folders}
        outside = _label(builders, _fill(builders, found, layout), layout, lists, str(self._path))
        builders = {split: builders[split] for split in SPLITS if split in builders}
        classes = _classes(builders, found, layout, str(self._path), say)
        _say_notes(outside, layout, lists if list(builders) == ["train"] else None, say)
        if self._val_ratio and list(builders) == ["train"]:
            builders = _held_out(builders["train"], self._val_ratio, self._seed, say)
        elif self._val_ratio:
            say(f"--val-ratio is not used: the source has the splits {', '.join(builders)}")
        shown, convert = lists.words(classes), self._converter()
        return [builder.build(classes, shown=shown, convert=convert) for builder in builders.values()]

    def _converter(self) -> Convert | None:
        """What makes events of a sample; None for images."""
        return None


class _Found:
    """The members of a source, by kind; what is passed over is counted and said."""

    def __init__(
        self, members: Iterable[Member], lists: Lists, passed_over: PassedOver, say: Callable[[str], None]
    ) -> None:
        self.images: list[Member] = []
        """What is taken for an image: every file of no other known kind."""
        self.refused: list[Refusal] = []
        self.tree = Tree()
        self.folders: set[str] = set()
        """Folders that the source names, the empty ones among them."""
        self.beside: set[str] = set()
        """Folders that hold files of other kinds."""
        self.archive = ""
        """An archive in the source: perhaps the user meant to give that."""
        for item in members:
            name = item.name.decode("utf-8", "backslashreplace")
            if kind := passed_over.kind(item):
                if kind != HIDDEN:
                    self.beside.add(_above(name))
                    self.archive = self.archive or (name if kind in ARCHIVE_KINDS else "")
                    lists.offer(item)
            elif item.folder:
                self.folders.add(name)
            else:
                self._add(item, name)
        passed_over.tell(say)

    def _add(self, item: Member, name: str) -> None:
        is_far = name.count("/") > _MOST_FOLDERS
        if item.refused or is_far:
            reason = item.refused or f"its path has more than {_MOST_FOLDERS} folders"
            self.refused.append(Refusal(name=name[:_LONGEST_NAME], reason=reason))
            if is_far or name.startswith("/") or ".." in name.split("/"):
                return  # it lies in no folder of the collection
        elif name:
            self.images.append(item)
        self.tree.add(_above(name), image=not item.refused)

    def why(self, folder: str) -> str:
        """How many files below `folder` were refused, and why the first was; empty where nothing is known."""
        reasons = [one for one in self.refused if not folder or one.name.startswith(f"{folder}/")]
        if reasons:
            num = f"{len(reasons):,} files are" if len(reasons) > 1 else "1 file is"
            return f": {num} refused, first {reasons[0].name}: {reasons[0].reason}"
        return f"; it holds the archive {self.archive}: unpack or give that" if self.archive and not self.images else ""


def _above(name: str) -> str:
    return name.rpartition("/")[0]


def _fill(builders: dict[str, SplitBuilder], found: _Found, layout: Layout) -> list[Member]:
    """Gives every image in a class folder to the builder of its split; returns the other images."""
    spelled = _one_spelling(found.tree, layout)
    places: dict[str, tuple[str, str] | None] = {}
    outside = []
    for item in found.images:
        name = item.name.decode()
        folder = sys.intern(_above(name))
        if folder not in places:
            place = layout.place(folder)
            places[folder] = place and (place[0], sys.intern(spelled.get(place[1], place[1])))
        if place := places[folder]:
            builders[place[0]].add(name=name, label=place[1], place=0, offset=item.offset, length=item.length)
        else:
            outside.append(item)
    first = next(iter(builders.values()))
    for refusal in found.refused:
        folder = _above(refusal.name)
        if not any(is_in(folder, top) for tops in layout.unlabelled.values() for top in tops):
            place = layout.place(folder)
            (builders[place[0]] if place else first).refusals.append(refusal)
    return outside


def _one_spelling(tree: Tree, layout: Layout) -> dict[str, str]:
    """For class names that differ only in their Unicode form, as after unpacking on macOS, the one name to use."""
    names = {name for folders in layout.folders.values() for folder in folders for name in tree.below(folder)}
    forms = Counter(unicodedata.normalize("NFC", name) for name in names)
    twins = {name: form for name in names if forms[form := unicodedata.normalize("NFC", name)] > 1}
    if twins:
        layout.notes.append(f"class names in two Unicode forms are one class, normalised to NFC: {min(twins.values())}")
    return twins


def _label(
    builders: dict[str, SplitBuilder], outside: list[Member], layout: Layout, lists: Lists, where: str
) -> list[Member]:
    """Labels the images of a split without class folders by its list; returns the images that are still outside."""
    for split, tops in layout.unlabelled.items():
        here, others = [], []
        for item in outside:
            is_here = any(is_in(_above(item.name.decode()), top) for top in tops)
            (here if is_here else others).append(item)
        outside = others
        listed = lists.labels(tops) if split == "val" else None
        if listed is not None:
            builders["val"] = SplitBuilder("val", next(iter(builders.values())).readers)
            _add_listed(builders["val"], here, *listed)
            layout.notes.append(f"the classes of val are those of {listed[0]}")
        elif split == "test":
            hint = "" if "val" in layout.folders.keys() | layout.unlabelled.keys() else "; --val-ratio 0.1 makes a val"
            layout.notes.append(f"test is passed over: {len(here):,} images of {tops[0]} without labels{hint}")
        else:
            raise DataError(
                f"{where}: {len(here):,} images of val lie in {tops[0]} and in no class folder, and there is no list "
                "of their classes (val_annotations.txt or LOC_val_solution.csv); sort them into a folder for each "
                "class, or move val away"
            )
    return outside


def _add_listed(builder: SplitBuilder, images: list[Member], listed_in: str, label_of: dict[str, str]) -> None:
    for item in images:
        name = item.name.decode()
        base = name.rsplit("/", 1)[-1]
        label = label_of.get(base) or label_of.get(base.rsplit(".", 1)[0])
        if label is None:
            builder.refuse(name, f"has no line in {listed_in}")
        else:
            builder.add(name=name, label=sys.intern(label), place=0, offset=item.offset, length=item.length)


def _classes(
    builders: dict[str, SplitBuilder], found: _Found, layout: Layout, where: str, say: Callable[[str], None]
) -> tuple[str, ...]:
    """The names of the classes in label order; `DataError` where a class is empty, or val has one that train lacks."""
    _refuse_empty_splits(found, layout, where)
    for split, builder in builders.items():
        for top in layout.folders.get(split, []):
            _refuse_empty(found, top, f"{where}: the class folder", f"of {split}")
        if not len(builder):
            raise DataError(f"{where}: the split {split} holds no image in a class folder; {LAYOUT}{found.why('')}")
    first, *others = builders.values()
    classes = first.class_names()
    for other in others:
        if extra := other.class_names() - classes:
            name = min(extra)
            near = [known for known in sorted(classes) if known.casefold() == name.casefold()]
            hint = f" ({first.name} has {near[0]})" if near else ""
            raise DataError(f"{where}: {other.name} has the class {name}, which {first.name} has not{hint}; {LAYOUT}")
    twins = Counter(name.casefold() for name in classes)
    if same := sorted(name for name in classes if twins[name.casefold()] > 1):
        say(f"warning: {same[0]} and {same[1]} are two classes, though only their case differs")
    if len(classes) == 1:
        say(f"warning: {min(classes)} is the only class, so that there is nothing to tell apart")
    return tuple(sorted(classes))


def _refuse_empty(found: _Found, top: str, what: str, of: str) -> None:
    """`DataError` for a class folder in `top` without an image. A folder with other kinds of files only is no class."""
    for name in found.tree.below(top):
        if not found.tree.has_images(join(top, name)):
            raise DataError(f"{what} {name} {of} holds no image that can be read{found.why(join(top, name))}")
    below = set(found.tree.below(top))
    for folder in sorted(found.folders):
        above, _, name = folder.rpartition("/")
        if above == top and name not in below and not any(is_in(other, folder) for other in found.beside):
            raise DataError(f"{what} {name} {of} is empty; fill it or remove it{found.why(folder)}")


def _refuse_empty_splits(found: _Found, layout: Layout, where: str) -> None:
    """`DataError` for an empty folder with a split's name: its images would otherwise be missed only much later."""
    if layout.root is not None:
        for folder in sorted(found.folders):
            above, _, name = folder.rpartition("/")
            is_bare = above == layout.root and name not in found.tree.below(above)
            if is_bare and split_of(name) and not any(is_in(other, folder) for other in found.beside):
                raise DataError(f"{where}: the split {folder} is empty; fill it or remove it")


def _say_notes(outside: list[Member], layout: Layout, lists: Lists | None, say: Callable[[str], None]) -> None:
    for note in layout.notes:
        say(note)
    if outside:
        name = outside[0].name.decode()
        say(f"{len(outside):,} files outside of class folders are no samples: {name}{', …' if outside[1:] else ''}")
    if lists and lists.splits:
        say(
            f"warning: {lists.splits[0]} looks like a list of a split and is not read: all images are train; move "
            "those of the list below test/, or hold out others by --val-ratio 0.1"
        )


def _held_out(train: SplitBuilder, ratio: float, seed: int, say: Callable[[str], None]) -> dict[str, SplitBuilder]:
    """Moves `ratio` of every class of `train` to val: those whose names have the lowest hashes, so that a file that is
    added later leaves nearly all others where they are. One image of each class stays in train."""
    by_class: dict[str, list[tuple[bytes, int]]] = {}
    for number in range(len(train)):
        label = train.class_of(number)
        base = train.name_of(number).rpartition(b"/")[2]  # the same in a folder and in an archive of it
        drawn = hashlib.blake2b(b"%d/%s/%s" % (seed, label.encode(), base), digest_size=8).digest()
        by_class.setdefault(label, []).append((drawn, number))
    builders = {
        "train": SplitBuilder("train", train.readers, train.refusals),
        "val": SplitBuilder("val", train.readers),
    }
    num_val = {label: min(round(ratio * len(drawn)), len(drawn) - 1) for label, drawn in by_class.items()}
    if not any(num_val.values()):
        most = max(map(len, by_class.values()))
        cure = f"give {0.5 / most + 0.005:.2f} or more" if most > 1 else "a class needs two or more"
        raise DataError(f"--val-ratio {ratio:g} holds out nothing, for the largest class has {most}; {cure}")
    if none := sorted(label for label, num in num_val.items() if not num):
        say(f"warning: --val-ratio {ratio:g} holds out nothing of {len(none)} small classes, first {none[0]}")
    for label in sorted(by_class):
        for place, (_, number) in enumerate(sorted(by_class[label], key=lambda one: (one[0], train.name_of(one[1])))):
            train.copy(number, builders["val" if place < num_val[label] else "train"])
    return builders
