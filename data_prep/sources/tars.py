"""Where the members of a tar lie, without reading or unpacking them.

Our own walk of the headers: `tarfile` keeps an object for each member, a gigabyte for ImageNet, and takes five times
as long. Only offsets come from here; no name is ever used as a path to write to. POSIX.1-2017 pax, section "ustar".
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.tar_format import BLOCK, end_of_tar, padded
from pipeline.errors import DataError

_REGULAR, _SPARSE = (b"0", b"\0", b"7"), b"S"
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a named pipe",
    _SPARSE: "a sparse file",
}
_FOLDERS, _LABEL, _GLOBAL_PAX, _PAX, _LONG_NAME, _LONG_LINK = (b"5", b"D"), b"V", b"g", b"x", b"L", b"K"
_WITH_DATA = (*_REGULAR, _SPARSE)  # for other kinds the writer decides whether data follow the header
_MAX_EXTENSION_BYTES = 1 << 20
_SIZE_DIGITS = 18  # most of a size in bytes, which fits into int64
_CHUNK = 1 << 20
_MAGIC, _MAGIC_AT = re.compile(b"ustar"), 257
_MAX_NAMED = 20
_AGAIN = "download it again, or give an archive of class folders"


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


def walk_tar(
    path: Path, start: int = 0, end: int | None = None, say: Callable[[str], None] | None = None
) -> Iterator[Member]:
    """The members of the tar, or of several joined ones, that occupy bytes `start` to `end` of the file `path`.

    Args:
        say: called where more zeros follow a tar than fill up its last record.

    Raises:
        DataError: it is no tar, is cut off, or is damaged; names the byte.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield from _walk(handle, path, start, os.fstat(handle).st_size if end is None else end, say)
    finally:
        os.close(handle)


def _walk(handle: int, path: Path, start: int, end: int, say: Callable[[str], None] | None) -> Iterator[Member]:
    at, closed, record = start, False, start
    long_name, pax = b"", {}
    while at < end:
        header = os.pread(handle, min(BLOCK, end - at), at)
        if not header.rstrip(b"\0"):
            # Empty blocks close a tar. Behind them may be more of them, or another tar, joined to this one.
            if long_name or pax:
                raise DataError(f"{path} is cut off: the member behind an extended header is missing; {_AGAIN}")
            zeros, closed = at, True
            at = _skip_zeros(handle, zeros, end)
            surplus = at - record - len(end_of_tar(zeros - record)) - (zeros - record)
            if say is not None and surplus > 0:
                say(
                    f"{path}: {surplus} more zeros behind its end than fill a tar up; harmless, unless a download "
                    "broke off and left them: compare the number of images"
                )
            record = at
            continue
        if len(header) < BLOCK or not _checksum_fits(header):
            raise DataError(f"{path} {_no_member(at, start, closed)}; {_AGAIN}")
        closed = False
        kind = header[156:157]
        length = _number(header[124:136], path, at)
        if kind not in (_GLOBAL_PAX, _PAX, _LONG_NAME, _LONG_LINK):
            length = int(pax.get(b"size", length))
            if length and kind not in _WITH_DATA and _begins_member(handle, at + BLOCK, end):
                length = 0  # some writers give a link the size of its target and store nothing
        data = at + BLOCK
        if kind == _SPARSE:
            data = _behind_map(handle, header, data)
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
        elif kind not in (_GLOBAL_PAX, _LONG_LINK, _LABEL):
            name = pax.get(b"path") or long_name or _short_name(header)
            folder = kind in _FOLDERS or (kind in _REGULAR and name.endswith(b"/"))  # the old format has no folders
            yield member(name, data, length, folder=folder, kind=_kind(kind, pax))
            long_name, pax = b"", {}
    if not closed:
        what = (
            "is not a tar archive: it is empty" if at == start else "is cut off: the blocks that end a tar are missing"
        )
        raise DataError(
            f"{path} {what}; download it again, or if you know it to be whole, give it unpacked, as a folder"
        )


def members_inside(data: memoryview) -> str:
    """The message for a member that holds others, since it was cut and another tar joined there; empty where none."""
    starts = (found.start() - _MAGIC_AT for found in _MAGIC.finditer(data))
    headers = (bytes(data[at : at + BLOCK]) for at in starts if at > 0 and at % BLOCK == 0 and at + BLOCK <= len(data))
    names = [_short_name(header).decode("utf-8", "backslashreplace") for header in headers if _checksum_fits(header)]
    if not names:
        return ""
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"it holds other members of the tar, which was cut and joined: {', '.join(names[:_MAX_NAMED])}{more}"


def _no_member(at: int, start: int, closed: bool) -> str:
    if at == start:
        return "is not a tar archive, nor a zip from its first byte on"
    if closed:
        return f"holds something behind its end that is no tar, from byte {at} on"
    return f"is damaged: no member at byte {at}"


def _skip_zeros(handle: int, at: int, end: int) -> int:
    """Offset of the first block from `at` on that holds something else than zeros; the last block may be incomplete."""
    while at < end:
        chunk = os.pread(handle, min(_CHUNK, end - at), at)
        if not chunk:
            return end
        kept = len(chunk.lstrip(b"\0"))
        if kept:
            return at + (len(chunk) - kept) // BLOCK * BLOCK
        at += len(chunk)
    return at


def _behind_map(handle: int, header: bytes, at: int) -> int:
    """Offset of the data of a sparse file: behind the blocks that continue the map of its holes."""
    goes_on = header[482]
    while goes_on:
        block = os.pread(handle, BLOCK, at)
        at += BLOCK
        goes_on = len(block) == BLOCK and block[504]
    return at


def _begins_member(handle: int, at: int, end: int) -> bool:
    """Whether a header or the end of the tar lies at `at`."""
    block = os.pread(handle, min(BLOCK, end - at), at) if at < end else b""
    return not block.rstrip(b"\0") or (len(block) == BLOCK and _checksum_fits(block))


def member(name: bytes, offset: int, length: int, *, folder: bool, kind: str) -> Member:
    """A member with its name made relative; refused where its name or its kind cannot be a sample's."""
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
        return _KINDS[_SPARSE]
    if kind in _REGULAR or kind in _FOLDERS:
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
    rest = header[:148] + header[156:]
    unsigned = sum(rest) + 8 * 0x20
    # Some old writers added the bytes as signed ones.
    return stated == unsigned or stated == unsigned - 256 * sum(byte > 127 for byte in rest)


def _number(text: bytes, path: Path, at: int) -> int:
    if text[0] & 0x80:  # GNU's base 256, for sizes from 8 GiB
        number = int.from_bytes(text[1:], "big")
        if text[0] == 0x80:
            return number
    else:
        digits = text.split(b"\0", 1)[0].strip() or b"0"
        if digits.isdigit() and not digits.strip(b"01234567"):  # int() would take a sign, too
            return int(digits, 8)
    raise DataError(f"{path} is damaged: no size in the header at byte {at}")


def _parse_pax(block: bytes, path: Path, at: int) -> dict[bytes, bytes]:
    records, position = {}, 0
    try:
        while position < len(block) and block[position]:
            space = block.index(b" ", position)
            length = int(block[position:space])
            key, _, value = block[space + 1 : position + length - 1].partition(b"=")
            if length < 5 or position + length > len(block):
                raise ValueError
            records[key] = value
            position += length
        size = records.get(b"size", b"0")
        if not size.isdigit() or len(size) > _SIZE_DIGITS:
            raise ValueError
    except ValueError:
        raise DataError(f"{path} is damaged: an extended header at byte {at} cannot be read") from None
    return records
