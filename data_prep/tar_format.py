"""The bytes of a shard's tar and of its DALI index, without the cost of `tarfile` for every image.

Byte for byte what `webdataset.TarWriter(mtime=0)` writes for `{"__key__": key, "cls": label, "jpg": image}`: a test
compares the two. `webdataset` itself is not imported here: it imports torch, which takes each worker seconds.
"""

import re
import tarfile

import numpy as np

BLOCK = 512
RECORD = 10240
INDEX_VERSION = "v1.2"
# A sample has four parts: the label's header and the label, a block each; the image's header; the image, padded.
IMAGE_AT = 3 * BLOCK
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")
_MAX_STEM = 60


def padded(length: int) -> int:
    """`length` rounded up to whole blocks."""
    return -(-length // BLOCK) * BLOCK


def sample_bytes(lengths: np.ndarray) -> np.ndarray:
    """Bytes that images of `lengths` bytes take in a shard, label and headers included."""
    return IMAGE_AT + -(-lengths // BLOCK) * BLOCK


def sample_key(number: int, name: str) -> str:
    """The key of the sample at position `number` of the plan: unique, ASCII, no dot, and it still names its file."""
    stem = name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    return f"{number:08d}_{_UNSAFE.sub('_', stem)[:_MAX_STEM]}"


class HeaderMaker:
    """Makes ustar headers of regular files by filling name, size and checksum into a prototype."""

    def __init__(self) -> None:
        info = tarfile.TarInfo("")
        info.mode, info.uname, info.gname = 0o444, "bigdata", "bigdata"
        self._prototype = info.tobuf(tarfile.USTAR_FORMAT)
        blank = bytearray(self._prototype)
        blank[124:136] = bytes(12)
        blank[148:156] = b" " * 8
        self._base_sum = sum(blank)

    def __call__(self, name: bytes, size: int) -> bytes:
        """The 512-byte header of the member `name`, at most 100 bytes, of `size` bytes, below 8 GiB."""
        digits = b"%011o\0" % size
        checksum = b"%06o\0 " % (self._base_sum + sum(name) + sum(digits))
        prototype = self._prototype
        return b"".join(
            (name, bytes(100 - len(name)), prototype[100:124], digits, prototype[136:148], checksum, prototype[156:])
        )


def end_of_tar(length: int) -> bytes:
    """What closes a tar of `length` bytes: two empty blocks, then zeros to a whole record."""
    closed = length + 2 * BLOCK
    return bytes(2 * BLOCK + -closed % RECORD)


def index_line(offset: int, key: str, label_length: int, extension: str, image_length: int) -> str:
    """The line of a sample, whose first header is at `offset`, in DALI's index: extension, offset, size, name each."""
    return (
        f"cls {offset + BLOCK} {label_length} {key}.cls "
        f"{extension} {offset + IMAGE_AT} {image_length} {key}.{extension}\n"
    )
