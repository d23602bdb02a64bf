"""A shard set's records and bytes. A shard is opened at first use; the least recently used is closed again.

The ranks of a node share a cache. A rank must not wait for a shard while it holds others, which then cannot be evicted:
all ranks could deadlock. So a rank releases its shards before it waits for one, and between micro-batches (`rest`),
where it may wait for the other ranks.
"""

import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np

from pipeline.data.cache import Cache, Held
from pipeline.data.manifest import SAMPLE_DTYPE, Manifest, Shard, read_samples
from pipeline.data.remote import RETRIES, TIMEOUT_S, ClosedError, Remote, is_remote
from pipeline.errors import DataError, is_outage
from pipeline.run_dir import caches, outages

MAX_OPEN = 4096
"""Most shards open at a time: the records of each are in memory (24 kB for 1,000 samples)."""
_RESERVED_FILES = 256
"""Descriptors within the process's limit that are left for other uses: sockets, DALI, an evaluation."""
BAD_READS = 3
"""Reads of a place of a tar that fail with EIO, while its folder can be listed, before the place counts as damaged."""
_Result = TypeVar("_Result")
_TAR_BLOCK = 512
_TAR_NAME = 100


class _Open(NamedTuple):
    descriptor: int
    """Descriptor of the tar."""
    samples: np.ndarray
    """Its records."""
    held: Held | None
    """The hold of a cached shard; None for a local one."""


class Shards:
    """A shard set. Threads may share it; while one waits for a shard, the others wait too.

    Args:
        folder: a path, or a URL whose shards then come through `cache_dir`.
        cache_dir, cache_bytes, retries, timeout_s: see `DataConfig`; for a URL.

    Raises:
        ConfigError: there is no set in the folder.
        DataError: its manifest is damaged; later, a shard is missing or its records do not fit the manifest.
        StoreError: later, the storage of its files is gone, and did not come back.
    """

    def __init__(
        self,
        folder: str,
        *,
        cache_dir: str = "",
        cache_bytes: int = 0,
        retries: int = RETRIES,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.folder, self.manifest = folder, Manifest.load(folder, retries=retries, timeout_s=timeout_s)
        self._cache = None
        if is_remote(folder):
            remote = Remote(folder, retries=retries, timeout_s=timeout_s)
            self._cache = Cache(cache_dir or str(caches.folder()), remote, capacity_bytes=cache_bytes)
        sizes = [shard.num_samples for shard in self.manifest.shards]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._starts = self._ends - np.asarray(sizes, dtype=np.int64)
        self.bytes_read = 0
        """Bytes of samples that this process read."""
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._records: dict[int, np.ndarray] = {}
        """Records of cached shards, which are opened again for each micro-batch."""
        self._one = threading.RLock()
        self._closing = threading.Event()
        self._where = f"data.path: {folder}" if self._cache is None else f"data.cache_dir: {cache_dir}"
        """What holds the files, in messages."""
        self._max_open = max_open(2 if self._cache is not None else 1)  # the tar and, for a cached shard, its lock

    def expect(self, soon: Sequence[int], *, once: bool = False) -> None:
        """Announces the shards that come next, in order. Closes all others; a cache may evict those, and reads ahead.

        `once`: the shards that are closed now are not needed again soon; a cache evicts them first.
        """
        with self._one:
            for shard in [shard for shard in self._open if shard not in soon]:
                self._shut(self._open.pop(shard))
            if self._cache is None:
                return
            for shard in [shard for shard in self._records if shard not in soon]:
                del self._records[shard]
                if once:
                    self._outlast(partial(self._cache.pass_over, self.manifest.shards[shard]))
            self._outlast(partial(self._cache.read_ahead, [self.manifest.shards[shard] for shard in soon]))

    def rest(self) -> None:
        """Releases all cached shards, as other ranks may need the room. Local shards stay open."""
        with self._one:
            while self._cache is not None and self._open:
                self._shut(self._open.popitem()[1])

    @property
    def is_cached(self) -> bool:
        return self._cache is not None

    def owners(self, numbers: np.ndarray) -> np.ndarray:
        """Shard index of each sample number."""
        return np.searchsorted(self._ends, numbers, side="right")

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard index and `SAMPLE_DTYPE` record of each sample number."""
        shards = self.owners(numbers)
        rows = numbers - self._starts[shards]
        records = np.empty(len(numbers), dtype=SAMPLE_DTYPE)
        with self._one:
            for shard in np.unique(shards).tolist():
                here = shards == shard
                known = self._records.get(shard)
                if known is None:
                    known = self._outlast(partial(self._opened, shard)).samples
                records[here] = known[rows[here]]
        return shards, records

    def read(self, shard: int, offset: int, length: int) -> bytes:
        """`length` bytes of a shard's tar from `offset`; `OSError` if unreadable, `EOFError` if the tar is shorter or
        damaged there; `StoreError` if its storage is gone, and did not come back.
        """
        failed = 0

        def bytes_there() -> bytes:
            nonlocal failed
            try:
                return os.pread(self._opened(shard).descriptor, length, offset)
            except OSError as error:
                failed += 1
                if error.errno == errno.EIO and failed >= BAD_READS and (self.is_cached or _listed(self.folder)):
                    raise EOFError(f"{self.manifest.shards[shard].tar} cannot be read at byte {offset}") from None
                raise

        with self._one:
            content = self._outlast(bytes_there)
            self.bytes_read += len(content)
        if len(content) != length:
            raise EOFError(f"{self.manifest.shards[shard].tar} ends before byte {offset + length}")
        return content

    def _outlast(self, do: Callable[[], _Result]) -> _Result:
        """The result of `do`, as soon as the storage of the files is there; ends when the set is closed."""

        def reached() -> _Result:
            try:
                return do()
            except OSError as error:
                if is_outage(error, was_writable=True):
                    while self._open:  # what was opened before an outage may stay dead after it
                        self._shut(self._open.popitem()[1])
                raise

        def pause(seconds: float) -> None:
            if self._closing.wait(seconds):
                raise ClosedError

        return outages.outlast(reached, self._where, was_writable=self._cache is not None, pause=pause)

    def name(self, number: int) -> str:
        """A sample's name in messages, by which a person finds it: `train-000003.tar:00042.jpg`."""
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
        if len(self._open) >= self._max_open:
            self._shut(self._open.popitem(last=False)[1])
        entry = self.manifest.shards[shard]
        held = self._hold(entry)
        folder = held.folder if held is not None else self.folder
        try:
            samples = self._records.get(shard)
            if samples is None:
                samples = read_samples(folder, entry)
            descriptor = _descriptor(os.path.join(folder, entry.tar))
        except BaseException:
            if held is not None:
                held.release()
            raise
        self._open[shard] = _Open(descriptor, samples, held)
        if held is not None:
            self._records[shard] = samples
        return self._open[shard]

    def _hold(self, entry: Shard) -> Held | None:
        if self._cache is None:
            return None
        held = self._cache.hold_at_once(entry)
        if held is None:
            self.rest()
            held = self._cache.hold(entry)
        return held

    def _shut(self, shard: _Open) -> None:
        os.close(shard.descriptor)
        if shard.held is not None:
            shard.held.release()

    def interrupt(self) -> None:
        """Ends running downloads and waits; call it from any thread, before `close`."""
        self._closing.set()
        if self._cache is not None:
            self._cache.close()

    def close(self) -> None:
        """Closes every file."""
        self.interrupt()
        while self._open:
            self._shut(self._open.popitem()[1])


def max_open(files_per_shard: int) -> int:
    """How many shards may be open at a time under the process's own limit on open files (`ulimit -n`)."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return MAX_OPEN
    ours = limit - max(_RESERVED_FILES, limit // 4)
    return min(MAX_OPEN, max(8, ours // files_per_shard))


def _descriptor(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if is_outage(error):
            raise
        message = f"{path} cannot be opened ({error.strerror}); check the set with python -m data_prep verify"
        raise DataError(message) from None


def _listed(folder: str) -> bool:
    """Whether a local folder can be listed: its storage is there."""
    try:
        return bool(os.listdir(folder))
    except OSError:
        return False
