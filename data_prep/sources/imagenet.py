"""ImageNet as ILSVRC2012 is distributed: a tar of one tar for each synset, a flat tar, and the development kit.

Labels are 0-based in the order of sorted WNIDs. The development kit numbers classes differently (ILSVRC2012_ID: the
1,000 leaves of the hierarchy, then its inner nodes); its ground truth is mapped through its own table.
"""

import io
import re
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.collection import Split, SplitBuilder
from data_prep.sources.files import PassedOver, existing, open_collection, path_fingerprint
from data_prep.sources.lists import told_apart
from data_prep.sources.tars import Member, walk_tar
from pipeline.errors import ConfigError, DataError

_WNID = re.compile(r"n\d{8}")
_VAL_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\.")
_META = "data/meta.mat"
_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
_MAX_DEVKIT_BYTES = 64 << 20
_OFFICIAL = "give the official archives of one release, downloaded whole"


@dataclass(frozen=True, slots=True)
class Devkit:
    """What the development kit says."""

    words: dict[str, str]
    """WNID of each class: its first name."""
    truth: list[str]
    """WNID of each validation image, in the order of their numbers."""


class ImageNet:
    """The official archives, or the folders that they unpack to.

    Args:
        train: ILSVRC2012_img_train.tar, or a folder of synset folders.
        val: ILSVRC2012_img_val.tar, a flat folder of its images, or a folder of synset folders; None for no split.
        devkit: ILSVRC2012_devkit_t12.tar.gz or its folder; needed for a flat val.
    """

    def __init__(self, train: str, val: str | None, devkit: str | None) -> None:
        self._train = existing(train, "--train")
        self._val = existing(val, "--val") if val else None
        if val and not devkit:
            raise ConfigError("--val needs --devkit=ILSVRC2012_devkit_t12.tar.gz: the labels of val are in it")
        self._devkit = existing(devkit, "--devkit") if devkit else None
        self.description = f"ImageNet from {train}"

    def fingerprint(self) -> list:
        return [
            "imagenet",
            *(path_fingerprint(path) if path else None for path in (self._train, self._val, self._devkit)),
        ]

    def index(self, work: Path, say: Callable[[str], None]) -> list[Split]:
        devkit = read_devkit(self._devkit) if self._devkit else None
        train = self._index_train(work, say)
        found = train.class_names()
        if devkit and (odd := found - set(devkit.words)):
            raise DataError(
                f"{self._train} has the synset {min(odd)}, which is none of the {len(devkit.words)} classes of "
                f"{self._devkit}; {_OFFICIAL}"
            )
        if devkit and (missing := set(devkit.words) - found):
            num = f"{len(missing)} of the {len(devkit.words)} classes"
            say(f"warning: {num} have no training image, {min(missing)} for one")
        classes = tuple(sorted(devkit.words if devkit else found))
        display = {wnid: f"{wnid} {devkit.words[wnid]}" for wnid in classes} if devkit else None
        shown = told_apart({wnid: devkit.words[wnid] for wnid in classes}) if devkit else None
        splits = [train.build(classes, display, shown)]
        if self._val and devkit:
            splits.append(self._index_val(self._val, devkit, work, say).build(classes, display, shown))
        return splits

    def _index_train(self, work: Path, say: Callable) -> SplitBuilder:
        members, reader = open_collection(self._train, work, say)
        builder = SplitBuilder("train", [reader])
        passed_over = PassedOver()
        for wnid, item in self._train_members(members, builder, passed_over):
            if item.folder or passed_over.kind(item):
                continue
            name = item.name.decode("utf-8", "backslashreplace")
            name = name if name.startswith(f"{wnid}/") else f"{wnid}/{name}"
            if item.refused:
                builder.refuse(name, item.refused)
            else:
                builder.add(name=name, label=wnid, place=0, offset=item.offset, length=item.length)
        passed_over.tell(say)
        if empty := self._synsets - builder.class_names():
            raise DataError(f"{self._train}: the synset {min(empty)} holds no image; fill it or download it again")
        if not len(builder):
            raise DataError(f"{self._train} holds no synset such as n01440764.tar; give ILSVRC2012_img_train.tar")
        return builder

    def _train_members(
        self, members: Iterator[Member], builder: SplitBuilder, passed_over: PassedOver
    ) -> Iterator[tuple[str, Member]]:
        """WNID and member of every image, from a tar of tars or from synset folders."""
        self._synsets: set[str] = set()
        for item in members:
            name = item.name.decode("utf-8", "backslashreplace")
            wnid = sys.intern(name.split("/", 1)[0].removesuffix(".tar"))
            is_synset = bool(_WNID.fullmatch(wnid))
            if not is_synset and passed_over.kind(item):
                continue
            if item.refused and not self._train.is_dir():
                builder.refuse(name, item.refused)
            elif not is_synset:
                if not item.folder:
                    raise DataError(f"{self._train}: {ascii(name)[1:-1]} is no synset such as n01440764; {_OFFICIAL}")
            elif name.endswith(".tar") and "/" not in name:
                if self._train.is_dir():
                    raise DataError(
                        f"{self._train} holds {name}; give the tar that it was in, or unpack each to a folder"
                    )
                self._synsets.add(wnid)
                inner = walk_tar(self._train, item.offset, item.offset + item.length)
                yield from ((wnid, image) for image in inner)
            else:
                self._synsets.add(wnid)
                yield wnid, item

    def _index_val(self, path: Path, devkit: Devkit, work: Path, say: Callable) -> SplitBuilder:
        members, reader = open_collection(path, work, say)
        builder = SplitBuilder("val", [reader])
        numbers, passed_over = set(), PassedOver()
        for item in members:
            name = item.name.decode("utf-8", "backslashreplace")
            if item.folder or passed_over.kind(item):
                continue
            if item.refused:
                builder.refuse(name, item.refused)
                continue
            match = _VAL_NUMBER.match(name.rsplit("/", 1)[-1])
            number = int(match[1]) if match else 0
            if not 1 <= number <= len(devkit.truth):
                raise DataError(
                    f"{path}: {ascii(name)[1:-1]} is none of the {len(devkit.truth)} images of the ground truth, "
                    f"ILSVRC2012_val_00000001.JPEG and so on; {_OFFICIAL}"
                )
            numbers.add(number)
            builder.add(name=name, label=devkit.truth[number - 1], place=0, offset=item.offset, length=item.length)
        passed_over.tell(say)
        if len(numbers) + len(builder.refusals) != len(devkit.truth):
            raise DataError(
                f"{path} holds {len(numbers)} validation images, the ground truth of {self._devkit} has "
                f"{len(devkit.truth)} lines; {_OFFICIAL}"
            )
        return builder


def read_devkit(path: Path) -> Devkit:
    """Reads the synset table and the ground truth from the development kit, an archive or a folder."""
    from scipy.io import loadmat  # half a second of imports that no other source needs

    texts = _devkit_files(path)
    try:
        table = loadmat(io.BytesIO(texts[_META]), squeeze_me=True)["synsets"]
        rows = [
            (int(row["ILSVRC2012_ID"]), str(row["WNID"]), str(row["words"]), int(row["num_children"])) for row in table
        ]
    except (ValueError, KeyError, TypeError, OSError, IndexError, NotImplementedError, zlib.error) as error:
        raise DataError(f"{path}: {_META} holds no table of synsets ({error}); give ILSVRC2012_devkit_t12") from None
    leaves = {number: (wnid, words.split(",")[0].strip()) for number, wnid, words, children in rows if not children}
    try:
        truth = [leaves[int(line)][0] for line in texts[_TRUTH].decode("ascii").split()]
    except (ValueError, KeyError) as error:
        raise DataError(f"{path}: {_TRUTH} holds something else than class numbers ({error})") from None
    return Devkit(words=dict(leaves.values()), truth=truth)


def _devkit_files(path: Path) -> dict[str, bytes]:
    wanted = (_META, _TRUTH)
    found: dict[str, bytes] = {}
    if path.is_dir():
        base = next((base for base in (path, *sorted(path.iterdir())) if (base / _META).is_file()), path)
        found = {name: (base / name).read_bytes() for name in wanted if (base / name).is_file()}
    else:
        try:
            with tarfile.open(path) as archive:
                for item in archive:
                    name = next((name for name in wanted if item.name.endswith(name)), None)
                    stream = archive.extractfile(item) if name and item.isreg() else None
                    if name and stream and item.size <= _MAX_DEVKIT_BYTES:
                        found[name] = stream.read()
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise DataError(f"{path} is no tar or is cut off ({error}); give ILSVRC2012_devkit_t12.tar.gz") from None
    for name in wanted:
        if name not in found:
            raise DataError(f"{path} lacks {name}; give ILSVRC2012_devkit_t12.tar.gz (the kit of tasks 1 and 2)")
    return found
