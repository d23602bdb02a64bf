"""Write, then rename: whoever reads a file finds the old one or the whole new one, whatever killed the writer.

What is not whole yet lies beside its place as `.NAME.tmp`. The ending is its own, so nothing that looks for files by
their ending meets it. One process at a time writes a file. Nothing but the standard library.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def temporary(path: Path) -> Path:
    """Where what is to become `path`, a file or a folder, lies until it is whole."""
    return path.with_name(f".{path.name}.tmp")


def write(path: Path, content: str | bytes, *, sync: bool = False) -> None:
    """Puts a file with this content in place, text as UTF-8.

    Args:
        sync: have it on the disk when this returns. Without it a power cut may leave an empty file; a kill never does.

    Raises:
        OSError: it cannot be written; the old file stays, and nothing is left beside it.
    """
    with replacing(path, sync=sync) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Gives the name to write a file to; at the end the file is put in the place of `path`, after an error removed.

    Args:
        sync: as for `write`.
    """
    new = temporary(path)
    try:
        yield new
        if sync:
            flush(new)
        os.replace(new, path)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise
    if sync:
        flush(path.parent)


def flush(path: Path) -> None:
    """Has a file's content on the disk, or a folder's names, so that what was renamed there survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unfinished(folder: Path) -> list[Path]:
    """What killed writers left in a folder: files and folders under temporary names."""
    return sorted(folder.glob(".*.tmp"))
