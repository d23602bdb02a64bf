"""Reads the bytes of a sample from an archive, a folder or memory; unpacks compressed files."""

import bz2
import gzip
import lzma
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path

from data_prep.images import RefusedError
from pipeline.errors import DataError

LOCAL_HEADER = 30
"""Bytes of a zip member's own header, before its name."""
_LOCAL = struct.Struct("<4s5H3L2H")
_SIZES_BEHIND = 8  # flag: checksum and sizes follow the data
_DESCRIPTOR = b"PK\7\x08"
_CHUNK = 1 << 16
_UNPACKED_CHUNK = 4 << 20
_GZIP, _BZIP2, _XZ = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0"
_Decompressor = bz2.BZ2Decompressor | lzma.LZMADecompressor


def read_exactly(handle: int, view: memoryview, offset: int, path: Path) -> None:
    """Fills `view` from `offset` of an open file; `OSError` where the file ends before."""
    filled = 0
    while filled < len(view):
        got = os.preadv(handle, [view[filled:]], offset + filled)
        if not got:
            raise OSError(
                0, f"ends at byte {offset + filled}, before the end of a member (was it cut or changed?)", str(path)
            )
        filled += got


class FileReader:
    """Members that lie uncompressed in one file, found by their offset: a tar, a tar of tars."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = -1

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def _open(self) -> int:
        if self._handle < 0:
            self._handle = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        return self._handle

    def read_into(self, view: memoryview, offset: int, name: str) -> None:
        read_exactly(self._open(), view, offset, self._path)

    def prefetch(self, offset: int, length: int) -> None:
        os.posix_fadvise(self._open(), offset, length, os.POSIX_FADV_WILLNEED)


class FolderReader:
    """Files below a folder, found by name; `prefix` is the part of a sample's name before the path in the folder."""

    def __init__(self, root: Path, prefix: str = "") -> None:
        self._root, self._skip = root, len(prefix)

    def read_into(self, view: memoryview, offset: int, name: str) -> None:
        path = self._root / name[self._skip :]
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.fstat(handle).st_size != len(view):
                raise OSError(0, "changed its size since it was indexed", str(path))
            read_exactly(handle, view, 0, path)
        finally:
            os.close(handle)

    def prefetch(self, offset: int, length: int) -> None:
        pass


class ZipReader(FileReader):
    """Members of a zip, stored or deflated, found by the offset of their local header."""

    def read_into(self, view: memoryview, offset: int, name: str) -> None:
        """Fills `view` with the member; `RefusedError` where its data are damaged: cut, or with a wrong checksum."""
        handle = self._open()
        header = bytearray(LOCAL_HEADER)
        read_exactly(handle, memoryview(header), offset, self._path)
        signature, _, flags, method, _, _, checksum, _, _, name_length, extra_length = _LOCAL.unpack(header)
        if signature != b"PK\3\4":
            raise RefusedError(f"damaged: no zip member at byte {offset}")
        data = offset + LOCAL_HEADER + name_length + extra_length
        if method == 0:
            read_exactly(handle, view, data, self._path)
            end = data + len(view)
        else:
            end = self._inflate(handle, view, data)
        if flags & _SIZES_BEHIND:
            behind = os.pread(handle, 8, end)
            checksum = int.from_bytes(behind[4:8] if behind[:4] == _DESCRIPTOR else behind[:4], "little")
        if zlib.crc32(view) != checksum:
            raise RefusedError("damaged: its checksum is not the one in the zip")

    def _inflate(self, handle: int, view: memoryview, at: int) -> int:
        """Unpacks the stream at `at` into `view`, which it must fill to the byte, and returns the offset behind it."""
        inflater, filled = zlib.decompressobj(-zlib.MAX_WBITS), 0
        try:
            while not inflater.eof:
                chunk = inflater.unconsumed_tail or os.pread(handle, _CHUNK, at)
                if not chunk:
                    raise RefusedError("damaged: its data in the zip end early")
                at += 0 if inflater.unconsumed_tail else len(chunk)
                block = inflater.decompress(chunk, len(view) - filled + 1)
                if filled + len(block) > len(view):
                    raise RefusedError(f"damaged: more than the {len(view)} bytes that the zip's directory says")
                view[filled : filled + len(block)] = block
                filled += len(block)
        except zlib.error as error:
            raise RefusedError(f"damaged: its data in the zip cannot be inflated ({error})") from None
        if filled < len(view):
            raise RefusedError(f"damaged: {filled} bytes of the {len(view)} that the zip's directory says")
        return at - len(inflater.unused_data)


class MemoryReader:
    """Samples in one block of memory."""

    def __init__(self, blob: bytes) -> None:
        self._blob = blob

    def read_into(self, view: memoryview, offset: int, name: str) -> None:
        view[:] = self._blob[offset : offset + len(view)]

    def prefetch(self, offset: int, length: int) -> None:
        pass


def is_compressed(magic: bytes) -> bool:
    """Whether a file that begins with `magic` is one that `unpacked` reads."""
    return magic.startswith((_GZIP, _BZIP2, _XZ))


def unpacked(path: Path) -> Iterator[bytes]:
    """What the gzip, bzip2 or xz file `path` holds: all of its streams, which may be several, one behind another.

    Raises:
        DataError: it is cut off, damaged, or has something behind its last stream.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(len(_XZ))
            file.seek(0)
            if magic.startswith(_GZIP):
                with gzip.open(file) as stream:
                    while chunk := stream.read(_UNPACKED_CHUNK):
                        yield chunk
            else:
                yield from _streams(file, bz2.BZ2Decompressor if magic.startswith(_BZIP2) else lzma.LZMADecompressor)
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(_damaged(path, error)) from None
    except OSError as error:
        if error.errno is None:  # bz2 raises it for damaged data
            raise DataError(_damaged(path, error)) from None
        raise


def _damaged(path: Path, error: Exception) -> str:
    return f"{path} is cut off or damaged ({error}); download it again"


def _streams(file: BufferedReader, begin: Callable[[], _Decompressor]) -> Iterator[bytes]:
    """The streams of a bzip2 or xz file. `bz2.open` and `lzma.open` ignore other bytes behind a stream in silence."""
    stream = begin()
    while True:
        if stream.eof:
            packed = stream.unused_data.lstrip(b"\0")
            while not packed:  # zeros fill up to a block
                chunk = file.read(_CHUNK)
                if not chunk:
                    return
                packed = chunk.lstrip(b"\0")
            stream = begin()
        else:
            packed = file.read(_CHUNK) if stream.needs_input else b""
            if stream.needs_input and not packed:
                raise EOFError("it ends inside a stream")
        yield stream.decompress(packed, max_length=_UNPACKED_CHUNK)
