"""What the folders of a collection mean: splits, classes, images without a class. Decided by the folders alone.

The words of a folder's name say what it may be; its place among the others says what it is. What looks like splits but
stays ambiguous is refused: with a split taken for a class, a network would be trained on its own validation data.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from data_prep.sources.splits import SPLITS, is_exactly_split, likeness, part_base, split_of, split_words
from pipeline.errors import DataError

LAYOUT = "expected CLASS/IMAGE, or train/CLASS/IMAGE with val/ or test/ beside it"
_IMAGE_WORDS = "image images img imgs jpg jpeg jpegs jpegimages png pngs picture pictures photo photos"
_OTHER_WORDS = (
    "annotation annotations label labels mask masks segmentation segmentations segmentationclass segmentationobject "
    "trimaps bboxes ground_truth groundtruth"
)
_IMAGES, _BESIDE = frozenset(_IMAGE_WORDS.split()), frozenset(_OTHER_WORDS.split())
_UNKNOWN = frozenset(("unknown", "unlabeled", "unlabelled", "all", "data", "0"))


def join(folder: str, name: str) -> str:
    """The path of `name` in `folder`; the folder "" is the top of the collection."""
    return f"{folder}/{name}" if folder else name


def is_in(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or lies below it."""
    return not folder or path == folder or path.startswith(f"{folder}/")


class Tree:
    """The folders of a collection that hold images, at any depth. Refused files count: they were meant as images."""

    def __init__(self) -> None:
        self.images: Counter[str] = Counter()
        """Number of images that lie in a folder itself, by its path."""
        self._below: dict[str, set[str]] = {}
        self._filled: set[str] = set()

    def add(self, folder: str, *, image: bool) -> None:
        """Notes a file of `folder`: an image, or with `image` False a refused file."""
        self.images[folder] += image
        above = folder
        while image and above not in self._filled:
            self._filled.add(above)
            above = above.rpartition("/")[0]
        while folder:
            above, _, name = folder.rpartition("/")
            names = self._below.setdefault(above, set())
            if name in names:
                return
            names.add(name)
            folder = above

    def has_images(self, folder: str) -> bool:
        """Whether an image lies in `folder` or below."""
        return folder in self._filled

    def below(self, folder: str) -> list[str]:
        """Names of the folders in `folder` that hold something, sorted."""
        return sorted(self._below.get(folder, ()))

    def is_deep(self, folder: str) -> bool:
        """Whether `folder` holds folders that are not empty."""
        return folder in self._below

    def num_images(self, folder: str) -> int:
        """Images in `folder` and in all folders below."""
        return sum(num for path, num in self.images.items() if is_in(path, folder))

    def holders(self) -> list[str]:
        """Folders that hold folders which are not empty, sorted."""
        return sorted(self._below)


@dataclass(slots=True)
class Layout:
    """Where the class folders of each split lie."""

    folders: dict[str, list[str]]
    """By split, the folders that its class folders lie in."""
    unlabelled: dict[str, list[str]] = field(default_factory=dict)
    """By split, folders whose images lie in no class folder; a list of labels may know their classes."""
    root: str | None = None
    """The folder that the splits lie in; None where there are only classes."""
    notes: list[str] = field(default_factory=list)
    """What a user should know, a line each."""

    def place(self, folder: str) -> tuple[str, str] | None:
        """Split and class of the images in `folder`; None where they have no class folder."""
        for split, tops in self.folders.items():
            for top in tops:
                rest = folder.removeprefix(join(top, "")) if top else folder
                if rest and (not top or folder.startswith(f"{top}/")):
                    return split, rest.split("/", 1)[0]
        return None


def find_layout(tree: Tree, where: str) -> Layout:
    """Splits and class folders of the collection `where`; `DataError` where they are ambiguous."""
    root = _root(tree)
    tops = tree.below(root)
    if not tops:
        num = tree.num_images(root)
        loose = f"; {num:,} images lie in none, so that their classes are unknown" if num else ""
        raise DataError(f"{where} holds no image in a class folder; {LAYOUT}{loose}")
    understood = {top: split for top in tops if (split := split_of(top))}
    others = [top for top in tops if top not in understood]
    like = [top for top in others if likeness(top)]
    if len(like) == len(others) and like and len(set().union(*map(likeness, tops))) > 1:
        raise DataError(
            f"{where}: {_some(tops)} look like splits, and {like[0]} is none of train, val and test; rename it, or "
            f"give one of them alone; {LAYOUT}"
        )
    if not others or (len(set(understood.values())) > 1 and any(tree.is_deep(join(root, top)) for top in understood)):
        if with_classes := [top for top in others if _has_classes(tree, join(root, top))]:
            raise DataError(
                f"{where}: {_some(list(understood))} look like splits, but {_some(with_classes)} beside them like "
                "classes; move these away, or rename the splits if they are classes"
            )
        return _with_splits(tree, root, understood, where)
    beside = [top for top in tops if top.casefold() in _BESIDE and tree.is_deep(join(root, top))]
    if _is_generic(tops) or beside:
        num = sum(tree.num_images(join(root, top)) for top in beside or tops)
        raise DataError(
            f"{where}: {_some(beside or tops)} is no name of a class, so {num:,} images have no labels; {LAYOUT}"
        )
    layout = Layout({"train": [root]})
    _check_below(tree, layout, where)
    return layout


def _has_classes(tree: Tree, folder: str) -> bool:
    """Whether `folder` holds class folders. A mere wrapper of images is none: seg_pred/seg_pred/IMAGE."""
    name = folder.rsplit("/", 1)[-1]
    while tree.below(folder) in ([name], ["images"]):
        folder = join(folder, tree.below(folder)[0])
    return tree.is_deep(folder)


def _root(tree: Tree) -> str:
    """The folder below all wrappers. A wrapper is the only folder in its folder, holds folders, and is no split."""
    root = ""
    while len(tops := tree.below(root)) == 1:
        inner = join(root, tops[0])
        if not tree.is_deep(inner):
            break
        split, below = split_of(tops[0]), tree.below(inner)
        holds_splits = all(split_of(name) for name in below) and {split_of(name) for name in below} != {split}
        if split and not holds_splits:
            break
        root = inner
    return root


def _with_splits(tree: Tree, root: str, understood: dict[str, str], where: str) -> Layout:
    layout, named = Layout({}, root=root), {}
    for split in SPLITS:
        tops = [top for top, of in understood.items() if of == split]
        if len({part_base(top) for top in tops}) > 1:  # fruits-360: beside Test lie photos without classes
            tops = [top for top in tops if tree.is_deep(join(root, top))] or tops
        if len({part_base(top) for top in tops}) > 1:
            raise DataError(f"{where}: {_some(tops)} all look like the split {split}; keep one, or give one alone")
        if tops:
            layout.folders[split] = [_unwrapped(tree, join(root, top), split, where) for top in tops]
            named[split] = _some(tops)
    first, *held_out = layout.folders
    classes = _classes(tree, layout.folders[first])
    if not classes or _is_generic(classes):
        num = sum(map(tree.num_images, layout.folders[first]))
        raise DataError(
            f"{where}: the split {first} holds no image in a class folder: {num:,} images lie in "
            f"{_some(layout.folders[first])} and have no labels; sort them into a folder for each class"
        )
    for split in held_out:
        below = _classes(tree, layout.folders[split])
        if not below or _is_generic(below) or (below.isdisjoint(classes) and len(below) == 1 and _is_vague(*below)):
            layout.unlabelled[split] = layout.folders.pop(split)
            del named[split]
    if "val" not in layout.folders.keys() | layout.unlabelled.keys() and "test" in layout.folders:
        # Without val, test becomes val: training evaluates on the split of that name.
        layout.folders["val"], named["val"] = layout.folders.pop("test"), named.pop("test")
    if any(text != split for split, text in named.items()):
        layout.notes.append("splits: " + "; ".join(f"{split} from {text}" for split, text in named.items()))
    _check_below(tree, layout, where)
    return layout


def _classes(tree: Tree, folders: list[str]) -> set[str]:
    return {name for folder in folders for name in tree.below(folder)}


def _unwrapped(tree: Tree, folder: str, split: str, where: str) -> str:
    """The folder of class folders of a split, below any wrapper: seg_train/seg_train/CLASS."""
    while len(below := tree.below(folder)) == 1 and not tree.images[folder]:
        inner = join(folder, below[0])
        if not tree.is_deep(inner) or not (split_words(below[0]) == {split} or below[0].casefold() in _IMAGES):
            break
        folder = inner
    if len({split_of(name) for name in below} - {None}) > 1 and all(map(split_of, below)):
        raise DataError(
            f"{where}: {folder} holds {_some(below)}, which look like splits themselves; give {folder} alone, or move "
            "them beside each other"
        )
    return folder


def _is_generic(names: Iterable[str]) -> bool:
    """Whether all `names` say only what kind of files lie there, images among them, not of which class."""
    lowered = {name.casefold() for name in names}
    return bool(lowered & _IMAGES) and lowered <= _IMAGES | _BESIDE


def _is_vague(name: str) -> bool:
    """Whether the only folder of a held-out split may be no class: test/unknown, test/test."""
    return name.casefold() in _UNKNOWN | _IMAGES or bool(split_of(name))


def _check_below(tree: Tree, layout: Layout, where: str) -> None:
    """Refuses class folders that hold splits, or masks beside their images; notes those that hold other folders."""
    nested, tops = [], {top for folders in layout.folders.values() for top in folders}
    for folder in tree.holders():
        if folder in tops or layout.place(folder) is None:
            continue
        names = tree.below(folder)
        exact = {split_of(name) for name in names if is_exactly_split(name)}
        if len(exact) > 1 or (all(map(split_of, names)) and len(set(map(split_of, names))) > 1):
            raise DataError(
                f"{where}: {folder} holds {_some(names)}, which look like splits; {LAYOUT}: splits stand above classes"
            )
        if not {name.casefold() for name in names}.isdisjoint(_BESIDE) and (_is_generic(names) or tree.images[folder]):
            raise DataError(
                f"{where}: {folder} holds {_some(names)}, so that other files would be packed as images too; move "
                "all but the images away"
            )
        if folder.rpartition("/")[0] in tops and (len(names) > 1 or tree.images[folder]):
            nested += [join(folder, name) for name in names]
    if nested:
        layout.notes.append(f"folders in class folders belong to their class: {_some(nested)}")


def _some(names: list[str]) -> str:
    """Up to three of `names`, in words."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
