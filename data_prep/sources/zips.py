"""Where the members of a zip lie. PKWARE APPNOTE 6.3.10, sections 4.3 and 4.5.3.

Our own reading of the central directory, for the reason that `tars.py` gives: `zipfile` keeps a kilobyte a member.
"""

import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from data_prep.sources.tars import Member, member
from pipeline.errors import DataError

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_CHUNK = 1 << 20
_DEFLATE_RATIO = 1032  # no deflated byte stands for more
_FULL_16, _FULL_32 = 0xFFFF, 0xFFFFFFFF


def walk_zip(path: Path) -> Iterator[Member]:
    """The members of the zip `path`; `DataError` where it is damaged or cut off."""
    with open(path, "rb") as file:
        total = os.fstat(file.fileno()).st_size
        at, size, num_entries = _directory(file.fileno(), path, total)
        file.seek(at)
        buffer = b""
        left = size
        for _ in range(num_entries):
            while len(buffer) < _ENTRY.size or len(buffer) < _entry_length(buffer):
                chunk = file.read(min(_CHUNK, left))
                if not chunk:
                    raise DataError(f"{path} is damaged: its directory ends early; download it again")
                left -= len(chunk)
                buffer += chunk
            length = _entry_length(buffer)
            if buffer[:4] != b"PK\1\2":
                raise DataError(f"{path} is damaged: its directory holds something else; download it again")
            yield _member(buffer[:length], path, total)
            buffer = buffer[length:]


def _entry_length(buffer: bytes) -> int:
    name, extra, comment = struct.unpack_from("<3H", buffer, 28)
    return _ENTRY.size + name + extra + comment


def _directory(handle: int, path: Path, total: int) -> tuple[int, int, int]:
    """Offset, size and number of entries of the central directory of a file of `total` bytes."""
    tail_at = max(0, total - _END.size - _FULL_16)
    tail = os.pread(handle, total - tail_at, tail_at)
    found = tail.rfind(b"PK\5\6")
    if found < 0 or found + _END.size > len(tail):
        raise DataError(f"{path} is not a zip archive, or is cut off; download it again")
    _, _, _, _, num_entries, size, at, _ = _END.unpack_from(tail, found)
    locator = found - _END64_LOCATOR.size
    if (
        (num_entries == _FULL_16 or _FULL_32 in (size, at))
        and locator >= 0
        and tail[locator : locator + 4] == b"PK\6\7"
    ):
        _, _, end64, _ = _END64_LOCATOR.unpack_from(tail, locator)
        record = os.pread(handle, _END64.size, min(end64, total))
        if len(record) < _END64.size or record[:4] != b"PK\6\6":
            raise DataError(f"{path} is damaged: its directory cannot be found; download it again")
        *_, num_entries, size, at = _END64.unpack(record)
    if at + size > total:
        raise DataError(f"{path} is cut off or has something before it; download it again")
    return at, size, num_entries


def _member(entry: bytes, path: Path, total: int) -> Member:
    fields = _ENTRY.unpack_from(entry)
    flags, method, packed, length = fields[3], fields[4], fields[8], fields[9]
    name_length, extra_length, external, offset = fields[10], fields[11], fields[15], fields[16]
    name = entry[_ENTRY.size : _ENTRY.size + name_length]
    extra = entry[_ENTRY.size + name_length : _ENTRY.size + name_length + extra_length]
    length, packed, offset = _widen(extra, length, packed, offset)
    if offset + packed > total:
        raise DataError(f"{path} is damaged: a member lies behind the end of the file; download it again")
    if not flags & 0x800:  # names without the UTF-8 flag are in the code page of the first PC
        name = name if name.isascii() else name.decode("cp437").encode()
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
    return member(name.replace(b"\\", b"/"), offset, length, folder=name.endswith(b"/"), kind=kind)


def _widen(extra: bytes, length: int, packed: int, offset: int) -> tuple[int, int, int]:
    """Length, packed length and offset with the 64-bit values that the zip64 field holds for full ones."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            values = [int.from_bytes(extra[i : i + 8], "little") for i in range(at + 4, at + 4 + size - 7, 8)]
            wide = [values.pop(0) if narrow == _FULL_32 and values else narrow for narrow in (length, packed, offset)]
            return wide[0], wide[1], wide[2]
        at += 4 + size
    return length, packed, offset
