"""The members of a folder or an archive of any format, what reads them, and what tells whether they changed."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from data_prep.collection import Reader
from data_prep.progress import size
from data_prep.shards import TEMPORARY
from data_prep.sources.readers import FileReader, FolderReader, ZipReader, is_compressed, unpacked
from data_prep.sources.tars import Member, member, walk_tar
from data_prep.sources.zips import walk_zip
from pipeline.errors import ConfigError


def existing(path: str, option: str) -> Path:
    """`path`, or a `ConfigError` that names the option it came from."""
    found = Path(path)
    if not path or not found.exists():  # the empty path, of an unset variable, would be the current folder
        raise ConfigError(f"{option}: {path or repr(path)} does not exist; check the path")
    return found


def walk_folder(root: Path) -> Iterator[Member]:
    """Files and folders below `root`, symbolic links followed, sorted; the offset of a file is its time of change.

    An unpacked collection is the user's own and often linked together; loops of links are cut.
    """
    seen: set[tuple[int, int]] = set()

    def below(folder: str, prefix: bytes) -> Iterator[Member]:
        about = os.stat(folder)
        if (about.st_dev, about.st_ino) in seen:
            return
        seen.add((about.st_dev, about.st_ino))
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda entry: os.fsencode(entry.name))
        for entry in ordered:
            name = prefix + os.fsencode(entry.name)
            try:
                about = entry.stat()
            except FileNotFoundError:
                yield member(name, 0, 0, folder=False, kind="a link to nothing")
                continue
            if stat.S_ISDIR(about.st_mode):
                yield member(name, about.st_mtime_ns, 0, folder=True, kind="")
                yield from below(entry.path, name + b"/")
            else:
                kind = "" if stat.S_ISREG(about.st_mode) else "a device, pipe or socket"
                yield member(name, about.st_mtime_ns, about.st_size, folder=False, kind=kind)

    yield from below(os.fspath(root), b"")


def path_fingerprint(path: Path) -> list:
    """Changes when the file, or any file below the folder, changes its name, size or time."""
    if not path.is_dir():
        about = path.stat()
        return [path.name, about.st_size, about.st_mtime_ns]
    digest, num = hashlib.sha256(), 0
    for found in walk_folder(path):
        if not found.folder:
            digest.update(b"%s\0%d\0%d\n" % (found.name, found.length, found.offset))
            num += 1
    return [num, digest.hexdigest()]


def open_collection(path: Path, work: Path, say: Callable[[str], None]) -> tuple[Iterator[Member], Reader]:
    """The members of a folder, tar, compressed tar or zip, and what reads them.

    A compressed tar has no places to read from: it is unpacked once, as one tar, into the folder `work`.
    """
    if path.is_dir():
        return walk_folder(path), FolderReader(path)
    with open(path, "rb") as file:
        magic = file.read(8)
    if magic[:4] in (b"PK\3\4", b"PK\5\6"):
        return walk_zip(path), ZipReader(path)
    if is_compressed(magic):
        path = _unpack(path, work, say)
    return walk_tar(path, say=say), FileReader(path)


def _unpack(path: Path, work: Path, say: Callable[[str], None]) -> Path:
    target = work / f"{TEMPORARY}{path.name}.unpacked"
    say(f"unpacking {path} ({size(path.stat().st_size)}) once, to {target}, which is removed at the end")
    with open(target, "wb") as out:
        for chunk in unpacked(path):
            out.write(chunk)
    return target
