"""Recordings of event cameras: files in class folders, loose or in archives, and DVS128 Gesture with its lists.

N-MNIST is Train.zip and Test.zip, CIFAR10-DVS ten archives, one a class: several sources are taken as if they lay in
one folder, each in a folder of its own name.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from data_prep.collection import Convert, Reader, Split
from data_prep.images import Inspected
from data_prep.sources.event_formats import EXTENSIONS, convert
from data_prep.sources.event_raw import Settings
from data_prep.sources.files import existing, open_collection, path_fingerprint
from data_prep.sources.gesture import CUT, HANDED, TRIALS, index_gesture
from data_prep.sources.imagefolder import ImageFolder
from data_prep.sources.readers import FileReader, FolderReader
from data_prep.sources.tars import Member
from pipeline.errors import ConfigError, DataError

_ENDINGS = re.compile(r"\.(?:zip|tgz|tbz2?|txz|tar(?:\.\w+)?)$")


class Recordings(ImageFolder):
    """Recordings in folders by class, with the rules of `ImageFolder`; or DVS128 Gesture, which is known by its lists.

    Args:
        paths: folders or archives.
        settings: what the files do not say of themselves.
        val_ratio: share of every class to hold out as val where the source has one split only.
        seed: draws what is held out.
    """

    _wanted = EXTENSIONS
    _noun = "recordings"

    def __init__(self, paths: list[str], settings: Settings, val_ratio: float, seed: int) -> None:
        self._paths, self.settings = [existing(path, "events") for path in paths], settings
        for path in self._paths:
            if path.is_file() and path.suffix[1:].casefold() in EXTENSIONS:
                raise ConfigError(f"events: {path} is one recording; give the folder of the class folders")
        super().__init__(paths[0], val_ratio, seed)
        names = [_stem(path) for path in self._paths]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"events: two sources are called {max(names, key=names.count)}; rename one of them, or give a link "
                "of another name"
            )
        self.description = f"the recordings in {', '.join(paths[:3])}{', …' if len(paths) > 3 else ''}"

    def fingerprint(self) -> list:
        settings = [self.settings.sensor, self.settings.time_unit]
        names = [_stem(path) for path in self._paths] if len(self._paths) > 1 else []  # of one it is in no sample
        return ["events", *names, *(path_fingerprint(path) for path in self._paths), settings, self._val_ratio]

    def index(self, work: Path, say: Callable[[str], None]) -> list[Split]:
        opened = [open_collection(path, work, say) for path in self._paths]
        try:
            if len(opened) > 1:
                members, reader = _together([_stem(path) for path in self._paths], opened)
                if found := [member for member in members if _is_list_of_gesture(member)]:
                    name, _, rest = found[0].name.decode("utf-8", "replace").partition("/")
                    raise ConfigError(f"events: {name} holds {rest}, a list of DVS128 Gesture; give that alone")
            else:
                members, reader = list(opened[0][0]), opened[0][1]
                if any(map(_is_list_of_gesture, members)):
                    if self._val_ratio:
                        say("--val-ratio is not used: DVS128 Gesture has the splits train, val")
                    file_of = _file_of(self._paths[0], reader)
                    return index_gesture(members, reader, file_of, self.settings, str(self._paths[0]), say)
            splits = self._index_members(members, reader, say)
            if not all(CUT.search(split.names[number]) for split in splits for number in range(len(split))):
                return splits
            say(f"by their names these are of DVS128 Gesture: {HANDED}")
            return [replace(split, handed=True) for split in splits]
        except DataError as error:
            raise DataError(_of_recordings(str(error), str(self._paths[0]))) from None

    def _converter(self) -> Convert | None:
        return partial(_convert, self.settings)


def _convert(settings: Settings, name: str, data: memoryview) -> Inspected:
    return convert(name, data, settings)


def _is_list_of_gesture(member: Member) -> bool:
    return member.name.rsplit(b"/", 1)[-1] in TRIALS


def _stem(path: Path) -> str:
    """What a source is called: a link by its own name, not by that of what it leads to."""
    name = path.name if path.name not in ("", "..") else path.resolve().name
    return _ENDINGS.sub("", name)


def _file_of(path: Path, reader: Reader) -> Callable[[Member], tuple[Path, int]]:
    """The file that a member lies in, uncompressed, and where in it; `DataError` for members of a zip."""

    def find(member: Member) -> tuple[Path, int]:
        if type(reader) is FolderReader:
            return path / member.name.decode("utf-8"), 0
        if type(reader) is FileReader:
            return reader.path, member.offset
        raise DataError(f"{path}: DVS128 Gesture is read from a folder, a tar or a tar.gz; unpack the zip first")

    return find


class _Together:
    """Several collections as one; their members are told apart by the first folder of their names."""

    def __init__(self, readers: dict[str, Reader]) -> None:
        self._readers = readers

    def read_into(self, view: memoryview, offset: int, name: str) -> None:
        source, _, rest = name.partition("/")
        self._readers[source].read_into(view, offset, rest)

    def prefetch(self, offset: int, length: int) -> None:
        pass


def _together(names: list[str], opened: Sequence[tuple[Iterable[Member], Reader]]) -> tuple[list[Member], Reader]:
    members = [
        replace(member, name=name.encode() + b"/" + member.name)
        for name, (found, _) in zip(names, opened, strict=True)
        for member in found
    ]
    return members, _Together({name: reader for name, (_, reader) in zip(names, opened, strict=True)})


def _of_recordings(message: str, path: str) -> str:
    """A message of `ImageFolder` in the words for recordings; the path in it stays as it is."""
    words = [re.sub(r"\bimage(s?)\b", r"recording\1", part).replace("/IMAGE", "/FILE") for part in message.split(path)]
    return path.join(words)
