"""How the bytes of a sample are had: from a file of an archive, from a folder, from memory."""

import os
import zlib
from pathlib import Path

_LOCAL_HEADER = 30  # bytes of a zip member's own header, before its name
_CHUNK = 1 << 16


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

    def _open(self) -> int:
        if self._handle < 0:
            self._handle = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        return self._handle

    def read_into(self, view: memoryview, offset: int, name: str) -> None:
        read_exactly(self._open(), view, offset, self._path)

    def prefetch(self, offset: int, length: int) -> None:
        os.posix_fadvise(self._open(), offset, length, os.POSIX_FADV_WILLNEED)


class FolderReader:
    """Files below a folder, found by name; `prefix` is what the sample's name has before the path below the folder."""

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
        handle = self._open()
        header = bytearray(_LOCAL_HEADER)
        read_exactly(handle, memoryview(header), offset, self._path)
        if header[:4] != b"PK\3\4":
            raise OSError(0, f"no zip member at byte {offset} (was it changed?)", str(self._path))
        method = int.from_bytes(header[8:10], "little")
        data = (
            offset + _LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        )
        if method == 0:
            read_exactly(handle, view, data, self._path)
            return
        inflater, filled = zlib.decompressobj(-zlib.MAX_WBITS), 0
        try:
            while filled < len(view):
                chunk = inflater.unconsumed_tail or os.pread(handle, _CHUNK, data)
                data += 0 if inflater.unconsumed_tail else len(chunk)
                block = inflater.decompress(chunk, len(view) - filled)
                if not chunk or (not block and inflater.eof):
                    raise OSError(0, f"the member {name} ends early", str(self._path))
                view[filled : filled + len(block)] = block
                filled += len(block)
        except zlib.error as error:
            raise OSError(0, f"the member {name} cannot be inflated ({error})", str(self._path)) from None


class MemoryReader:
    """Samples in one block of memory."""

    def __init__(self, blob: bytes) -> None:
        self._blob = blob

    def read_into(self, view: memoryview, offset: int, name: str) -> None:
        view[:] = self._blob[offset : offset + len(view)]

    def prefetch(self, offset: int, length: int) -> None:
        pass
