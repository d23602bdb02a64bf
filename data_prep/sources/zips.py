"""Where the members of a zip lie. PKWARE APPNOTE 6.3.10, sections 4.3, 4.5.3 and 4.6.9.

Our own reading of the central directory, for the reason that `tars.py` gives: `zipfile` keeps a kilobyte a member.
"""

import mmap
import os
import stat
import struct
import zlib
from array import array
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path

import numpy as np

from data_prep.sources.readers import LOCAL_HEADER
from data_prep.sources.tars import Member, member
from pipeline.errors import DataError

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_END64_HEAD = 12  # bytes of that record that its own length does not count
_CHUNK = 1 << 20
_SLACK = 96  # gaps up to so many bytes are not searched: extra fields and descriptors, too small for an image
_DEFLATE_RATIO = 1032  # most bytes that one deflated byte can stand for
_UTF8 = 0x800  # flag bit 11
_ZIP64, _UNICODE_PATH = 1, 0x7075
_FULL_16, _FULL_32 = 0xFFFF, 0xFFFFFFFF
_AGAIN = "download it again"


def walk_zip(path: Path, say: Callable[[str], None] = lambda _: None) -> Iterator[Member]:
    """The members of the zip `path`; says where the encoding of their names is not known.

    Raises:
        DataError: it is damaged or cut off, or has something before or behind it, such as a second zip.
    """
    with open(path, "rb") as file:
        total = os.fstat(file.fileno()).st_size
        at, size, num_entries = _directory(file.fileno(), path, total)
        places, listed = array("q"), set()  # where each member begins, and where it ends at the earliest
        guessed = b""
        for entry in _entries(file, at, size, path):
            found, end, is_guessed = _member(entry, path, at)
            guessed = guessed or (found.name if is_guessed else b"")
            places.extend((found.offset, end))
            listed.add(hash(found.name))
            yield found
        if guessed:
            say(
                f"warning: the names in {path} are neither marked as UTF-8 nor are it, and are read as code page 437, "
                f"such as {guessed.decode()}; where that is wrong, unpack it and give the folder"
            )
        if (num_found := len(places) // 2) % (_FULL_16 + 1) != num_entries % (_FULL_16 + 1):
            raise DataError(f"{path} is damaged: its directory lists {num_found} members of {num_entries}; {_AGAIN}")
        yield from _unlisted(file, np.array(places, dtype=np.int64).reshape(-1, 2), at, listed)


def _entries(file: BufferedReader, at: int, size: int, path: Path) -> Iterator[bytes]:
    """The entries of the central directory, which fill `size` bytes. The end record's 16-bit count may be too small."""
    file.seek(at)
    buffer, left = b"", size
    while left or buffer:
        while len(buffer) < _ENTRY.size or len(buffer) < _entry_length(buffer):
            chunk = file.read(min(_CHUNK, left))
            if not chunk:
                raise DataError(f"{path} is damaged: its directory ends early; {_AGAIN}")
            left -= len(chunk)
            buffer += chunk
        length = _entry_length(buffer)
        if buffer[:4] != b"PK\1\2":
            raise DataError(f"{path} is damaged: its directory holds something else; {_AGAIN}")
        yield buffer[:length]
        buffer = buffer[length:]


def _entry_length(buffer: bytes) -> int:
    name, extra, comment = struct.unpack_from("<3H", buffer, 28)
    return _ENTRY.size + name + extra + comment


def _directory(handle: int, path: Path, total: int) -> tuple[int, int, int]:
    """Offset, size and number of entries of the central directory of a file of `total` bytes."""
    tail_at = max(0, total - _END.size - _FULL_16)
    tail = os.pread(handle, total - tail_at, tail_at)
    found = len(tail)
    while (found := tail.rfind(b"PK\5\6", 0, found)) >= 0:
        # The record's comment must end with the file: else this is no record, or something lies behind the zip.
        if found + _END.size <= len(tail) and found + _END.size + _END.unpack_from(tail, found)[-1] == len(tail):
            break
    if found < 0:
        behind = "has something behind its end, " if b"PK\5\6" in tail else ""
        raise DataError(f"{path} is not a zip archive, {behind}or is cut off; {_AGAIN}")
    _, _, _, _, num_entries, size, at, _ = _END.unpack_from(tail, found)
    end, locator = tail_at + found, found - _END64_LOCATOR.size
    if locator >= 0 and tail[locator : locator + 4] == b"PK\6\7":
        _, _, end64, _ = _END64_LOCATOR.unpack_from(tail, locator)
        record = os.pread(handle, _END64.size, min(end64, total))
        if len(record) < _END64.size or record[:4] != b"PK\6\6":
            raise DataError(f"{path} is damaged: its directory cannot be found; {_AGAIN}")
        _, length, *_, num_entries, size, at = _END64.unpack(record)
        if end64 + _END64_HEAD + length != tail_at + locator:
            raise DataError(f"{path} is damaged: something lies between the two records that end it; {_AGAIN}")
        end = end64
    if at + size != end:
        raise DataError(
            f"{path} is damaged, or has something before it, as two zips joined or a zip that unpacks itself: its "
            f"directory is {end - at - size} bytes from where it should be; {_AGAIN}, or unpack it and give the folder"
        )
    return at, size, num_entries


def _unlisted(file: BufferedReader, places: np.ndarray, directory: int, listed: set[int]) -> Iterator[Member]:
    """Members that lie in the file but not in its directory, as refused ones; older copies of listed members excepted.

    Args:
        places: `(n, 2)` int64, offset of each listed member and the earliest that it can end.
        directory: offset of the directory, where members end.
        listed: hashes of the listed names.
    """
    places = places[np.argsort(places[:, 0], kind="stable")]
    ends = np.maximum.accumulate(np.concatenate([[0], places[:, 1]]))
    starts = np.concatenate([places[:, 0], [directory]])
    gaps = np.flatnonzero(starts - ends > _SLACK)
    if not len(gaps):
        return
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for gap in gaps:
            at, end = int(ends[gap]), int(starts[gap])
            while 0 <= (at := mapped.find(b"PK\3\4", at, end)) <= end - LOCAL_HEADER:
                flags, packed, name_length, extra_length = struct.unpack_from("<6xH10xL4x2H", mapped, at)
                name_end = at + LOCAL_HEADER + name_length
                name, extra = mapped[at + LOCAL_HEADER : name_end], mapped[name_end : name_end + extra_length]
                name = _in_utf8(name, flags, extra)[0].replace(b"\\", b"/")
                found = member(name, at, 0, folder=name.endswith(b"/"), kind="not listed in the zip's directory")
                if hash(found.name) not in listed:
                    yield found
                at += LOCAL_HEADER + name_length + extra_length + packed


def _member(entry: bytes, path: Path, limit: int) -> tuple[Member, int, bool]:
    """What an entry of the directory says, the earliest that its member can end, and whether its name is a guess;
    members lie before `limit`."""
    fields = _ENTRY.unpack_from(entry)
    flags, method, packed, length = fields[3], fields[4], fields[8], fields[9]
    name_length, extra_length, external, offset = fields[10], fields[11], fields[15], fields[16]
    name = entry[_ENTRY.size : _ENTRY.size + name_length]
    extra = entry[_ENTRY.size + name_length : _ENTRY.size + name_length + extra_length]
    length, packed, offset = _widen(extra, length, packed, offset)
    end = offset + LOCAL_HEADER + name_length + packed
    if end > limit:
        raise DataError(f"{path} is damaged: a member lies behind the end of the file; {_AGAIN}")
    name, is_guessed = _in_utf8(name, flags, extra)
    mode = external >> 16
    kind = ""
    if stat.S_ISLNK(mode):
        kind = "a symbolic link"
    elif mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        kind = "a device or pipe"
    elif flags & 1:
        kind = "encrypted"
    elif method not in (0, 8):
        kind = f"compressed by method {method}, of which only 0 (stored) and 8 (deflate) are read"
    elif length > packed * (_DEFLATE_RATIO if method else 1):
        kind = f"said to hold {length} bytes, more than its {packed} packed bytes can"
    name = name.replace(b"\\", b"/")
    return member(name, offset, length, folder=name.endswith(b"/"), kind=kind), end, is_guessed


def _in_utf8(name: bytes, flags: int, extra: bytes) -> tuple[bytes, bool]:
    """`name` in UTF-8, and whether that is a guess. Without the flag of it, a field may hold it so; some programs
    write UTF-8 all the same; in the others' code pages, of which 437 is the format's own, it is a guess."""
    if flags & _UTF8 or name.isascii():
        return name, False
    for kind, value in _extra_fields(extra):
        if kind == _UNICODE_PATH and value[1:5] == zlib.crc32(name).to_bytes(4, "little"):
            return value[5:], False
    try:
        name.decode()
    except UnicodeDecodeError:
        return name.decode("cp437").encode(), True
    return name, False


def _extra_fields(extra: bytes) -> Iterator[tuple[int, bytes]]:
    """The kind and the value of each field."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        yield kind, extra[at + 4 : at + 4 + size]
        at += 4 + size


def _widen(extra: bytes, length: int, packed: int, offset: int) -> tuple[int, int, int]:
    """Length, packed length and offset with the 64-bit values that the zip64 field holds for full ones."""
    for kind, value in _extra_fields(extra):
        if kind == _ZIP64:
            values = [int.from_bytes(value[at : at + 8], "little") for at in range(0, len(value) - 7, 8)]
            wide = [values.pop(0) if narrow == _FULL_32 and values else narrow for narrow in (length, packed, offset)]
            return wide[0], wide[1], wide[2]
    return length, packed, offset
