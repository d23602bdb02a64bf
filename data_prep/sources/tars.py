"""Where the members of a tar lie, without reading or unpacking them.

Our own walk of the headers: `tarfile` keeps an object for each member, a gigabyte for ImageNet, and takes five times
as long. Only offsets come from here; no name is ever used as a path to write to. POSIX.1-2017 pax, section "ustar".
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.tar_format import BLOCK, padded
from pipeline.errors import DataError

_REGULAR = (b"0", b"\0", b"7")
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a named pipe",
    b"S": "a sparse file",
}
_FOLDER, _GLOBAL_PAX, _PAX, _LONG_NAME, _LONG_LINK = b"5", b"g", b"x", b"L", b"K"
_MAX_EXTENSION_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of an archive."""

    name: bytes
    offset: int
    """Of its bytes in the archive (in a zip: of its local header)."""
    length: int
    folder: bool = False
    refused: str = ""
    """Why it cannot be a sample: a link, a device, a path that leaves the archive. Empty where it can."""


def walk_tar(path: Path, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """The members of the tar that occupies bytes `start` to `end` of the file `path`.

    Raises:
        DataError: it is no tar, is cut off, or is damaged; names the byte.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield from _walk(handle, path, start, os.fstat(handle).st_size if end is None else end)
    finally:
        os.close(handle)


def _walk(handle: int, path: Path, start: int, end: int) -> Iterator[Member]:
    at, long_name, pax = start, b"", {}
    while at + BLOCK <= end:
        header = os.pread(handle, BLOCK, at)
        if len(header) == BLOCK and not header.rstrip(b"\0"):
            return
        if len(header) < BLOCK or not _checksum_fits(header):
            what = "is not a tar archive" if at == start else f"is damaged: no member at byte {at}"
            raise DataError(f"{path} {what}; download it again, or give an archive of class folders")
        kind = header[156:157]
        length = _number(header[124:136], path, at)
        if kind not in (_GLOBAL_PAX, _PAX, _LONG_NAME, _LONG_LINK):
            length = int(pax.get(b"size", length))
        data = at + BLOCK
        if data + length > end:
            raise DataError(f"{path} is cut off: the member at byte {at} ends at byte {data + length} of {end}")
        at = data + padded(length)
        if kind in (_PAX, _LONG_NAME):
            if length > _MAX_EXTENSION_BYTES:
                raise DataError(f"{path} is damaged: an extended header of {length} bytes at byte {data - BLOCK}")
            block = os.pread(handle, length, data)
            if kind == _PAX:
                pax = _parse_pax(block, path, data)
            else:
                long_name = block.rstrip(b"\0")
        elif kind not in (_GLOBAL_PAX, _LONG_LINK):
            name = pax.get(b"path") or long_name or _short_name(header)
            linked = kind in (b"1", b"2", b"3", b"4", b"6")
            yield member(name, data, 0 if linked else length, folder=kind == _FOLDER, kind=_kind(kind, pax))
            if linked:  # some writers give a link the size of its target and store nothing
                at = data if kind != b"1" else at
            long_name, pax = b"", {}
    if at < end and at == start:
        raise DataError(f"{path} is not a tar archive; give an archive of class folders")


def member(name: bytes, offset: int, length: int, *, folder: bool, kind: str) -> Member:
    """A member with its name made relative, refused where its name or its kind allow no sample."""
    trimmed = name
    while trimmed.startswith(b"./"):
        trimmed = trimmed[2:]
    trimmed = trimmed.rstrip(b"/")
    refused = kind
    if not folder and not refused:
        if name.startswith(b"/") or b".." in name.split(b"/") or b"\0" in name:
            refused = "its path leaves the archive"
        else:
            try:
                trimmed.decode("utf-8")
            except UnicodeDecodeError:
                refused = "its name is not UTF-8"
    return Member(trimmed, offset, length, folder, refused)


def _kind(kind: bytes, pax: dict[bytes, bytes]) -> str:
    if any(key.startswith(b"GNU.sparse") for key in pax):
        return _KINDS[b"S"]
    if kind in _REGULAR or kind == _FOLDER:
        return ""
    return _KINDS.get(kind, f"a member of the unknown type {kind.decode('latin-1')!a}")


def _short_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _checksum_fits(header: bytes) -> bool:
    try:
        stated = int(header[148:156].split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return False
    return stated == sum(header) - sum(header[148:156]) + 8 * 0x20


def _number(text: bytes, path: Path, at: int) -> int:
    if text[0] & 0x80:  # GNU's base 256, for sizes from 8 GiB
        number = int.from_bytes(text[1:], "big")
        if text[0] == 0x80:
            return number
    else:
        try:
            return int(text.split(b"\0", 1)[0].strip() or b"0", 8)
        except ValueError:
            pass
    raise DataError(f"{path} is damaged: no size in the header at byte {at}")


def _parse_pax(block: bytes, path: Path, at: int) -> dict[bytes, bytes]:
    records, position = {}, 0
    try:
        while position < len(block) and block[position]:
            space = block.index(b" ", position)
            length = int(block[position:space])
            key, _, value = block[space + 1 : position + length - 1].partition(b"=")
            if length < 5:
                raise ValueError
            records[key] = value
            position += length
        int(records.get(b"size", b"0"))
    except ValueError:
        raise DataError(f"{path} is damaged: an extended header at byte {at} cannot be read") from None
    return records
