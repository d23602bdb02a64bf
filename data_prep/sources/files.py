"""The members of a folder or an archive of any format, their reader, and a fingerprint that shows changes."""

import errno
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from data_prep.collection import Reader
from data_prep.progress import size
from data_prep.sources.readers import FileReader, FolderReader, ZipReader, is_compressed, unpacked
from data_prep.sources.tars import Member, member, walk_tar
from data_prep.sources.zips import walk_zip
from data_prep.stores import SCRATCH
from pipeline.errors import ConfigError

# Files that lie beside images, known by their names. All others are taken for images, and refused if they are none.
_TEXTS = "txt csv tsv json jsonl xml yaml yml toml cfg conf ini db log md rst tex html htm css js url lnk names lst idx"
_OFFICE = "pdf doc docx xls xlsx ppt pptx odt ods rtf bak tmp part crdownload lock md5 sha1 sha256 torrent"
_CODE = "py pyc ipynb m r sh bat exe dll c cc cpp h java"
_TABLES = "mat npy npz pkl pickle h5 hdf5 pt pth ckpt onnx parquet arrow feather sqlite tfrecord rec data"
_FILMS = "mp4 m4v avi mov mkv webm mpg mpeg wmv flv 3gp mp3 wav flac ogg m4a aac"
_ARCHIVES = "zip tar gz tgz bz2 xz 7z rar zst"
_OTHER_KINDS = frozenset(f"{_TEXTS} {_OFFICE} {_CODE} {_TABLES} {_FILMS} {_ARCHIVES}".split())
_OTHER_NAMES = frozenset(("readme", "license", "licence", "copying", "makefile", "authors", "changelog", "icon\r"))
ARCHIVE_KINDS = frozenset(f".{kind}" for kind in _ARCHIVES.split())
"""Extensions of archives, which may hold a collection themselves."""
HIDDEN = "hidden"
# Folders of the system or a file server: they may hold thumbnails, which must not become samples.
_SYSTEM_FOLDERS = frozenset((b"__MACOSX", b"@eaDir", b"$RECYCLE.BIN", b"System Volume Information", b"lost+found"))


def existing(path: str, option: str) -> Path:
    """`path`, or a `ConfigError` that names the option it came from."""
    found = Path(path)
    if not path or not found.exists():  # an empty path, from an unset variable, would be the current folder
        raise ConfigError(f"{option}: {path or repr(path)} does not exist; check the path")
    return found


class PassedOver:
    """Finds by name the members that are no samples, and counts them, so that none is left out in silence.

    Args:
        wanted: extensions of the samples; None: every file may be an image that is of no other known kind.
        noun: what the samples are called.
    """

    def __init__(self, wanted: frozenset[str] | None = None, noun: str = "images") -> None:
        self._wanted, self._noun = wanted, noun
        self._kinds: Counter[str] = Counter()
        self._num_hidden = 0

    def kind(self, item: Member) -> str:
        """Empty for what may be an image or a folder of images; else HIDDEN, an extension, or a name without one."""
        if is_hidden(item.name):
            self._num_hidden += not item.folder
            return HIDDEN
        kind = "" if item.folder else _other_kind(item.name) if self._wanted is None else self._unwanted(item.name)
        if kind:
            self._kinds[kind] += 1
        return kind

    def _unwanted(self, name: bytes) -> str:
        base = name.rsplit(b"/", 1)[-1].decode("utf-8", "backslashreplace").casefold()
        extension = base.rpartition(".")[2] if "." in base else ""
        return "" if extension in (self._wanted or ()) else f".{extension}" if extension else base

    def tell(self, say: Callable[[str], None]) -> None:
        """Says what was passed over: one line for hidden files, one for the others."""
        if self._num_hidden:
            say(f"{self._num_hidden:,} hidden files (a dot before the name, or a folder of the system) are passed over")
        if self._kinds:
            counts = ", ".join(f"{kind} {num:,}" for kind, num in self._kinds.most_common(5))
            more = f" and {len(self._kinds) - 5} more kinds" if len(self._kinds) > 5 else ""
            num = sum(self._kinds.values())
            say(f"{num:,} files that are no {self._noun} by their names are passed over: {counts}{more}")


def is_hidden(name: bytes) -> bool:
    """Whether a member of this name, or a folder above it, is hidden: a leading dot, or a folder of the system's."""
    parts = name.split(b"/")
    return any((part.startswith(b".") and part not in (b".", b"..")) or part in _SYSTEM_FOLDERS for part in parts)


def _other_kind(name: bytes) -> str:
    base = name.rsplit(b"/", 1)[-1].decode("utf-8", "backslashreplace").casefold()
    if base in _OTHER_NAMES:
        return base.strip()
    extension = base.rpartition(".")[2] if "." in base else ""
    return f".{extension}" if extension in _OTHER_KINDS or extension.endswith("~") else ""


def walk_folder(root: Path) -> Iterator[Member]:
    """Files and folders below `root`, sorted; the offset of a file is its time of change.

    Symbolic links are followed: an unpacked collection is the user's own, and often made of links. A link to a folder
    that it lies in is refused.
    """

    def below(folder: str, prefix: bytes, above: tuple[tuple[int, int], ...]) -> Iterator[Member]:
        about = os.stat(folder)
        above = (*above, (about.st_dev, about.st_ino))
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda entry: os.fsencode(entry.name))
        for entry in ordered:
            name = prefix + os.fsencode(entry.name)
            try:
                about = entry.stat()
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):
                    raise
                yield member(name, 0, 0, folder=False, kind="a link to nothing")
                continue
            if not stat.S_ISDIR(about.st_mode):
                kind = "" if stat.S_ISREG(about.st_mode) else "a device, pipe or socket"
                yield member(name, about.st_mtime_ns, about.st_size, folder=False, kind=kind)
            elif (about.st_dev, about.st_ino) in above:
                yield member(name, 0, 0, folder=False, kind="a link to a folder that it lies in")
            else:
                yield member(name, about.st_mtime_ns, 0, folder=True, kind="")
                yield from below(entry.path, name + b"/", above)

    yield from below(os.fspath(root), b"", ())


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

    A compressed tar cannot be read from the middle: it is unpacked once, as one tar, into the folder `work`.
    """
    if path.is_dir():
        return walk_folder(path), FolderReader(path)
    with open(path, "rb") as file:
        magic = file.read(8)
    if magic[:4] in (b"PK\3\4", b"PK\5\6"):
        return walk_zip(path, say), ZipReader(path)
    if is_compressed(magic):
        path = _unpack(path, work, say)
    return walk_tar(path, say=say), FileReader(path)


def _unpack(path: Path, work: Path, say: Callable[[str], None]) -> Path:
    # Several sources may have one name: train/data.tar.gz beside val/data.tar.gz.
    place = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:16]
    target = work / f"{SCRATCH}{place}-{path.name}.unpacked"
    say(f"unpacking {path} ({size(path.stat().st_size)}) once, to {target}, which is removed at the end")
    with open(target, "wb") as out:
        for chunk in unpacked(path):
            out.write(chunk)
    return target
