"""Remote shards → local disk, shared by the ranks of a node; and the size that such a cache must have.

    CACHE/NAME-HASH/NAME.tar, NAME.npy    a complete shard, checked against its manifest
    CACHE/NAME-HASH.BYTES.part/           a shard that is being downloaded; BYTES is the space reserved for it
    CACHE/locks/NAME-HASH                 locked shared by each user of the shard, exclusively to download or evict it
    CACHE/locks/space                     locked while room is made

Ranks coordinate only by flock: the kernel releases it when a process dies, however it dies. The mtime of a lock file is
the shard's last use. Shards of the same name and hash are one shard, whichever set they belong to.
"""

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.background import Background
from pipeline.data.manifest import SAMPLE_DTYPE, Manifest, Shard
from pipeline.data.remote import ClosedError, MismatchError, Remote
from pipeline.errors import ConfigError, DataError, StoreError, is_outage
from pipeline.run_dir import atomic, locks, outages

POLL_S = 0.02
READ_AHEAD_THREADS = 2
_HEADER_BYTES = 256  # of a .npy file, at most
_OURS = re.compile(r"(?P<key>.+-[0-9a-f]{24})(\.(?P<bytes>\d+)\.part)?")  # the folders that the cache makes
READ_AHEAD = 2
"""Shards that an evaluation fetches ahead of use."""


class Held(NamedTuple):
    """A shard on local disk, safe from eviction until it is released."""

    folder: str
    lock: int

    def release(self) -> None:
        os.close(self.lock)


class _Used(NamedTuple):
    used: int
    """Bytes of complete shards and of reservations for downloads."""
    coming: bool
    """Whether a download is under way."""


class Cache:
    """Local copies of one remote set's shards.

    Args:
        folder: on a local disk, the same for all ranks of a node; several sets may share it.
        remote: where the shards come from.
        capacity_bytes: the most disk space that the cache takes.
        patience_s: how long to wait for room while every cached shard is in use and no download is under way.
    """

    def __init__(self, folder: str, remote: Remote, *, capacity_bytes: int, patience_s: float = 60.0) -> None:
        self._folder, self._remote, self._capacity, self._patience_s = Path(folder), remote, capacity_bytes, patience_s
        try:
            outages.outlast(lambda: (self._folder / "locks").mkdir(parents=True, exist_ok=True), str(folder))
        except OSError as error:
            raise ConfigError(f"data.cache_dir={folder!r} cannot be made ({error.strerror}); choose another") from None
        self._ahead = Background(READ_AHEAD_THREADS, name="read-ahead")
        self._wanted: frozenset[str] = frozenset()

    def hold_at_once(self, shard: Shard) -> Held | None:
        """Holds the shard if it is on disk and no process downloads or evicts it; else None. Does not wait."""
        key = _key(shard)
        lock = self._open_lock(key)
        if not locks.take(lock, shared=True) or not (self._folder / key).is_dir():
            os.close(lock)
            return None
        _touch(lock)
        return Held(str(self._folder / key), lock)

    def hold(self, shard: Shard) -> Held:
        """Waits until the shard is on disk, downloads it unless another process does, and holds it.

        A process that holds other shards while it waits here may deadlock the ranks, and itself.

        Raises:
            DataError: the shard or the disk cannot be used.
            StoreError: its store does not answer, or the cache has no room.
            OSError: the disk is gone.
        """
        key = _key(shard)
        while True:
            lock = self._lock(key, shared=True)
            if (self._folder / key).is_dir():
                _touch(lock)
                return Held(str(self._folder / key), lock)
            os.close(lock)
            lock = self._lock(key)
            try:
                if not (self._folder / key).is_dir():
                    self._download(shard, lock, patience_s=self._patience_s)
            finally:
                os.close(lock)  # it may be evicted before the shared lock is taken: then the loop tries again

    def read_ahead(self, shards: Sequence[Shard]) -> None:
        """Downloads shards in the background, in this order; cancels what earlier calls asked for and did not start."""
        before, self._wanted = self._wanted, frozenset(_key(shard) for shard in shards)
        if self._wanted == before:
            return
        for shard in shards:
            if (self._folder / _key(shard)).is_dir():
                lock = self._open_lock(_key(shard))
                _touch(lock)  # so that it is not evicted next
                os.close(lock)
            if _key(shard) not in before:
                self._ahead.submit(self._read_ahead, shard)

    def pass_over(self, shard: Shard) -> None:
        """Makes the shard the first to be evicted: it will not be needed again soon."""
        lock = self._open_lock(_key(shard))
        os.utime(lock, ns=(0, 0))
        os.close(lock)

    def _read_ahead(self, shard: Shard) -> None:
        key = _key(shard)
        if key not in self._wanted or (self._folder / key).is_dir():
            return
        lock = self._open_lock(key)
        try:
            if locks.take(lock) and not (self._folder / key).is_dir():  # else another process is at it
                self._download(shard, lock, patience_s=0)
        except (DataError, ClosedError):
            pass  # whoever needs the shard tries again, and reports what fails then
        finally:
            os.close(lock)

    def _lock(self, key: str, *, shared: bool = False) -> int:
        """A lock file's descriptor, locked. Waits in steps, so that closing the loader ends the wait."""
        descriptor = self._open_lock(key)
        while not locks.take(descriptor, shared=shared):
            if self._remote.stopped.wait(POLL_S):
                os.close(descriptor)
                raise ClosedError
        return descriptor

    def _open_lock(self, key: str) -> int:
        return os.open(self._folder / "locks" / key, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def _download(self, shard: Shard, lock: int, *, patience_s: float) -> None:
        """Downloads and checks both files in a .part folder, then renames it. The caller holds the exclusive `lock`."""
        key = _key(shard)
        needed = cached_bytes(shard)
        part = self._folder / f"{key}.{needed}.part"
        try:
            while True:
                try:
                    _touch(lock)  # so that the new shard is not evicted next
                    self._make_room(part, needed, patience_s)
                    for name, sha256 in ((shard.samples, shard.samples_sha256), (shard.tar, shard.sha256)):
                        self._fetch(name, part / name, sha256)
                    with self._space():  # so that `_used_bytes` never runs during the rename
                        os.rename(part, self._folder / key)
                    return
                except OSError as error:
                    if is_outage(error, was_writable=True):
                        raise
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise DataError(f"{part} cannot be written ({error.strerror})") from None
                    with self._space():
                        if not self._evict_one():
                            raise DataError(
                                f"the disk of data.cache_dir={str(self._folder)!r} is full: {self._remote.url} needs "
                                f"{needed} bytes for {shard.tar}; free some, or choose another folder"
                            ) from None
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _fetch(self, name: str, path: Path, sha256: str) -> None:
        def check() -> None:
            with open(path, "rb") as file:
                found = hashlib.sha256()
                while block := file.read(1 << 20):
                    found.update(block)
            if found.hexdigest() != sha256:
                size = path.stat().st_size
                raise MismatchError(f"its {size} bytes have SHA-256 {found.hexdigest()}, the manifest says {sha256}")

        self._remote.fetch(name, str(path), check)
        atomic.flush(path)  # a power cut must not leave a whole name on half a file

    def _make_room(self, part: Path, needed: int, patience_s: float) -> None:
        """Evicts until `needed` bytes fit, then reserves them by creating the folder `part`."""
        waited = 0.0
        while True:
            with self._space():
                shutil.rmtree(part, ignore_errors=True)  # left by a killed process or an earlier attempt
                while (there := self._used_bytes()).used + needed > self._capacity:
                    if not self._evict_one():
                        break
                else:
                    part.mkdir(exist_ok=True)
                    return
            if waited >= patience_s:
                raise StoreError(
                    f"data.cache_bytes={self._capacity} leaves no room for {needed} bytes of {self._remote.url}: "
                    f"{there.used} bytes in {str(self._folder)!r} are in use, perhaps by another run; "
                    "raise it, or give this run another data.cache_dir"
                )
            if self._remote.stopped.wait(POLL_S):
                raise ClosedError
            waited = 0.0 if there.coming else waited + POLL_S  # a running download will end and can then be evicted

    @contextmanager
    def _space(self) -> Iterator[None]:
        lock = self._lock("space")
        try:
            yield
        finally:
            os.close(lock)

    def _entries(self) -> Iterator[tuple[os.DirEntry[str], re.Match[str]]]:
        """The folders that the cache made; other entries of the folder are the user's, and left alone."""
        for entry in os.scandir(self._folder):
            ours = _OURS.fullmatch(entry.name)
            if ours and entry.is_dir(follow_symlinks=False):
                yield entry, ours

    def _used_bytes(self) -> _Used:
        """Space taken by complete shards and running downloads; removes what killed processes left half done."""
        used, coming = 0, False
        for entry, ours in self._entries():
            if ours["bytes"] is None:
                used += sum(file.stat().st_size for file in os.scandir(entry.path))
            elif not self._evict(ours["key"], entry.path):
                used, coming = used + int(ours["bytes"]), True
        return _Used(used, coming)

    def _evict_one(self) -> bool:
        """Removes the least recently used shard that no process holds; False if there is none."""
        keys = [ours["key"] for _, ours in self._entries() if ours["bytes"] is None]
        return any(self._evict(key, os.fspath(self._folder / key)) for key in sorted(keys, key=self._last_use))

    def _last_use(self, key: str) -> int:
        try:
            return (self._folder / "locks" / key).stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _evict(self, key: str, folder: str) -> bool:
        lock = self._open_lock(key)
        try:
            if not locks.take(lock):
                return False
            if not folder.endswith(".part"):  # at once out of its place: a half removed shard must not be found there
                os.rename(folder, folder := f"{folder}.0.part")
            shutil.rmtree(folder)
            return True
        finally:
            os.close(lock)

    def close(self) -> None:
        """Ends running downloads, without waiting: a stalled one ends at its timeout or with the process."""
        self._remote.stopped.set()
        self._ahead.close(wait=False)


def cached_bytes(shard: Shard) -> int:
    """The most bytes that a shard takes in the cache."""
    return shard.num_bytes + shard.num_samples * SAMPLE_DTYPE.itemsize + _HEADER_BYTES


def _touch(lock: int) -> None:
    now = time.time_ns()  # the default clock of the file system ticks only every few milliseconds
    os.utime(lock, ns=(now, now))


def _key(shard: Shard) -> str:
    return f"{shard.name}-{shard.sha256[:16]}{shard.samples_sha256[:8]}"


def training_shards(
    shard_sizes: Sequence[int], *, window_shards: int, ranks: int, share: int, micro_batch: int, global_batch: int
) -> int:
    """The most shards that `ranks` neighbouring ranks need at once, for any seed and epoch.

    These are the shards of the windows that hold the ranks' shares of one step, and of the window that each rank needs
    next (`Order.coming`).

    Args:
        shard_sizes: samples in each shard.
        window_shards: shards that are shuffled together; 0 for all.
        ranks: ranks of one node.
        share: a rank's samples of a global batch.
    """
    total, window = len(shard_sizes), window_shards or len(shard_sizes)
    ascending = np.sort(np.asarray(shard_sizes, dtype=np.int64))
    smallest_window = int(ascending[:window].sum())
    rest = total % window  # shards in the last window of an epoch
    smallest_rest = int(ascending[:rest].sum())
    if window >= total or smallest_window == 0:
        return total

    def most(ends: int, between: int) -> int:
        """The most shards in `ends` windows and in the whole windows that fit into `between` positions."""
        whole = (ends + max(0, between) // smallest_window) * window
        if not rest or between < smallest_rest:
            return whole
        return max(whole, (ends + (between - smallest_rest) // smallest_window) * window + rest)

    def touched(positions: int) -> int:
        return most(min(2, positions), positions - 2)

    # The window that a rank needs next begins less than one global batch after the end of its present one.
    following = min(ranks * window, most(1, global_batch - 1))
    together, each = touched(ranks * share) + following, ranks * (touched(micro_batch) + window)
    return min(total, together, each)


def evaluation_bytes(manifest: Manifest, *, micro_batch: int, ranks: int) -> int:
    """The most bytes that `ranks` ranks of a node need at once while they evaluate a split.

    Each rank needs the shards of one micro-batch, and `READ_AHEAD` more.
    """
    num_bytes = np.asarray([cached_bytes(shard) for shard in manifest.shards], dtype=np.int64)
    before = np.concatenate(([0], np.cumsum(num_bytes)))
    ends = np.cumsum([shard.num_samples for shard in manifest.shards])
    first = np.arange(0, manifest.num_samples, micro_batch)
    last = np.minimum(first + micro_batch, manifest.num_samples) - 1
    until = np.minimum(np.searchsorted(ends, last, side="right") + 1 + READ_AHEAD, len(num_bytes))
    of_one = before[until] - before[np.searchsorted(ends, first, side="right")]
    return min(int(num_bytes.sum()), ranks * int(of_one.max(initial=0)))


def least_cache(data: DataConfig, train: Manifest, evaluation: Manifest | None, *, ranks: int, world_size: int) -> int:
    """The smallest `data.cache_bytes` for `ranks` ranks a node that train and evaluate between steps."""
    sizes = [shard.num_samples for shard in train.shards]
    count = training_shards(
        sizes,
        window_shards=data.window_shards,
        ranks=ranks,
        share=data.global_batch // world_size,
        micro_batch=data.micro_batch,
        global_batch=data.global_batch,
    )
    needed = sum(sorted((cached_bytes(shard) for shard in train.shards), reverse=True)[:count])
    if evaluation is not None:
        needed += evaluation_bytes(evaluation, micro_batch=data.micro_batch, ranks=ranks)
    return needed


def check_cache(data: DataConfig, train: Manifest, evaluation: Manifest | None, *, ranks: int, world_size: int) -> None:
    """Raises a `ConfigError` for a `data.cache_bytes` below `least_cache`."""
    needed = least_cache(data, train, evaluation, ranks=ranks, world_size=world_size)
    if needed > data.cache_bytes:
        of_whom = f"the {ranks} ranks of a node need" if ranks > 1 else "a node of one rank needs"
        raise ConfigError(
            f"data.cache_bytes={data.cache_bytes} does not hold the shards that {of_whom} at once (of the windows that "
            f"are read and the next ones, and of an evaluation between steps); use at least {needed}, or a smaller "
            "data.window_shards"
        )
