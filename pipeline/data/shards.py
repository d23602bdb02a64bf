"""A shard set's records and bytes: opened when first needed, the least recently used closed again."""

import os
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from pipeline.data.manifest import SAMPLE_DTYPE, Manifest, read_samples
from pipeline.errors import DataError

MAX_OPEN = 128
"""Shards open at a time. Each takes two or three file descriptors, and 1,024 is a common limit."""
_TAR_BLOCK = 512
_TAR_NAME = 100


class _Open(NamedTuple):
    descriptor: int
    """Of the tar."""
    samples: np.ndarray
    """Memory-mapped records."""


class Shards:
    """A shard set in a folder. One thread uses it at a time.

    Raises:
        ConfigError: there is no set in the folder.
        DataError: its manifest is damaged; later, a shard is missing or its records are not the manifest's.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder, self.manifest = os.fspath(folder), Manifest.load(folder)
        sizes = [shard.num_samples for shard in self.manifest.shards]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._starts = self._ends - np.asarray(sizes, dtype=np.int64)
        self._open: OrderedDict[int, _Open] = OrderedDict()

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard index and `SAMPLE_DTYPE` record of each sample number."""
        shards = np.searchsorted(self._ends, numbers, side="right")
        rows = numbers - self._starts[shards]
        records = np.empty(len(numbers), dtype=SAMPLE_DTYPE)
        for shard in np.unique(shards):
            here = shards == shard
            records[here] = self._opened(int(shard)).samples[rows[here]]
        return shards, records

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """`length` bytes of a shard's tar from `offset`; `OSError` if they cannot be read or are not there."""
        content = os.pread(self._opened(shard).descriptor, length, offset)
        if len(content) != length:
            raise EOFError(f"{self.manifest.shards[shard].tar} ends before byte {offset + length}")
        return content

    def name(self, number: int) -> str:
        """Where a person finds a sample: `train-000003.tar:00042.jpg`."""
        (shard,), (record,) = self.locate(np.array([number]))
        tar = self.manifest.shards[shard].tar
        try:
            header = self.read(int(shard), int(record["offset"]) - _TAR_BLOCK, _TAR_NAME)
        except (OSError, EOFError):
            header = b""
        member = header.split(b"\0", 1)[0].decode("utf-8", "replace")
        return f"{tar}:{member or 'sample ' + str(number - self._starts[shard])}"

    def _opened(self, shard: int) -> _Open:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= MAX_OPEN:
            self._shut(self._open.popitem(last=False)[1])
        entry = self.manifest.shards[shard]
        path = os.path.join(self.folder, entry.tar)
        samples = read_samples(self.folder, entry)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(
                f"{path} cannot be opened ({error.strerror}); check the set with python -m data_prep verify"
            ) from None
        self._open[shard] = _Open(descriptor, samples)
        return self._open[shard]

    def _shut(self, shard: _Open) -> None:
        os.close(shard.descriptor)

    def close(self) -> None:
        """Closes every file; a later call opens what it needs again."""
        while self._open:
            self._shut(self._open.popitem()[1])
