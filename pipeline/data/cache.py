"""Remote shards → local disk, shared by the ranks of a node.

    CACHE/NAME-HASH/NAME.tar, NAME.npy    a shard that is complete and was checked against its manifest
    CACHE/NAME-HASH.BYTES.part/           one that is being downloaded, and the bytes that it will take
    CACHE/locks/NAME-HASH                 held shared by each user of the shard, exclusively by who downloads or evicts
    CACHE/locks/space                     held while room is made

All agreement between ranks is by flock: the kernel lets go of it when a process dies, however it dies. The time of a
lock file is the shard's last use. Two shards with one hash are one, whichever set they belong to.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pipeline.data.background import Background
from pipeline.data.manifest import SAMPLE_DTYPE, Shard
from pipeline.data.remote import ClosedError, MismatchError, Remote
from pipeline.errors import ConfigError, DataError, StoreError

POLL_S = 0.02
READ_AHEAD_THREADS = 2
_HEADER_BYTES = 256  # of a .npy file, at most
_OURS = re.compile(r"(?P<key>.+-[0-9a-f]{24})(\.(?P<bytes>\d+)\.part)?")  # the folders that the cache makes


class Held(NamedTuple):
    """A shard on local disk, safe from eviction until it is released."""

    folder: str
    lock: int

    def release(self) -> None:
        os.close(self.lock)


class _Used(NamedTuple):
    used: int
    """Bytes."""
    coming: bool
    """Whether some of them are being downloaded."""


class Cache:
    """Local copies of one remote set's shards.

    Args:
        folder: on a local disk, the same for all ranks of a node; several sets may share it.
        remote: where the shards come from.
        capacity_bytes: never taken more of the disk than this.
        patience_s: how long to wait for room while every cached shard is in use, and none is on its way.
    """

    def __init__(self, folder: str, remote: Remote, *, capacity_bytes: int, patience_s: float = 60.0) -> None:
        self._folder, self._remote, self._capacity, self._patience_s = Path(folder), remote, capacity_bytes, patience_s
        try:
            (self._folder / "locks").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"data.cache_dir={folder!r} cannot be made ({error.strerror}); choose another") from None
        self._ahead = Background(READ_AHEAD_THREADS, name="read-ahead")
        self._wanted: frozenset[str] = frozenset()

    def hold_at_once(self, shard: Shard) -> Held | None:
        """Keeps the shard on disk where it is there and nobody is at it; else None."""
        key = _key(shard)
        lock = self._open_lock(key)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        if not (self._folder / key).is_dir():
            os.close(lock)
            return None
        _touch(lock)
        return Held(str(self._folder / key), lock)

    def hold(self, shard: Shard) -> Held:
        """Waits until the shard is on disk, downloading it where no other process does, and keeps it there.

        Whoever holds shards while it waits may stall others, and itself.

        Raises:
            DataError: it cannot be had, or there is no room for it; a StoreError where its store does not answer.
        """
        key = _key(shard)
        while True:
            lock = self._lock(key, fcntl.LOCK_SH)
            if (self._folder / key).is_dir():
                _touch(lock)
                return Held(str(self._folder / key), lock)
            os.close(lock)
            lock = self._lock(key, fcntl.LOCK_EX)
            try:
                if not (self._folder / key).is_dir():
                    self._download(shard, lock, patience_s=self._patience_s)
            finally:
                os.close(lock)  # between this and the shared lock it may be evicted: then once more

    def read_ahead(self, shards: Sequence[Shard]) -> None:
        """Downloads shards in the background, in this order, and no longer those that an earlier call asked for."""
        before, self._wanted = self._wanted, frozenset(_key(shard) for shard in shards)
        if self._wanted == before:
            return
        for shard in shards:
            if (self._folder / _key(shard)).is_dir():
                lock = self._open_lock(_key(shard))
                _touch(lock)  # not the next to be evicted
                os.close(lock)
            if _key(shard) not in before:
                self._ahead.submit(self._read_ahead, shard)

    def pass_over(self, shard: Shard) -> None:
        """Makes the shard the first to be evicted: it was read, and will not be needed again soon."""
        lock = self._open_lock(_key(shard))
        os.utime(lock, ns=(0, 0))
        os.close(lock)

    def _read_ahead(self, shard: Shard) -> None:
        key = _key(shard)
        if key not in self._wanted or (self._folder / key).is_dir():
            return
        lock = self._open_lock(key)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (self._folder / key).is_dir():
                self._download(shard, lock, patience_s=0)
        except (BlockingIOError, DataError, ClosedError):
            pass  # another process is at it; or whoever needs the shard tries again, and reports what fails then
        finally:
            os.close(lock)

    def _lock(self, key: str, kind: int) -> int:
        """A lock file's descriptor, locked. Waits in steps, so that closing the loader ends the wait."""
        descriptor = self._open_lock(key)
        while True:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError:
                if self._remote.stopped.wait(POLL_S):
                    os.close(descriptor)
                    raise ClosedError from None

    def _open_lock(self, key: str) -> int:
        return os.open(self._folder / "locks" / key, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def _download(self, shard: Shard, lock: int, *, patience_s: float) -> None:
        """Under the shard's exclusive lock: both files into a folder, checked, then the folder to its place."""
        key = _key(shard)
        needed = cached_bytes(shard)
        part = self._folder / f"{key}.{needed}.part"
        try:
            while True:
                try:
                    _touch(lock)  # what has just come is not the next to be evicted
                    self._make_room(part, needed, patience_s)
                    for name, sha256 in ((shard.samples, shard.samples_sha256), (shard.tar, shard.sha256)):
                        self._fetch(name, part / name, sha256)
                    with self._space():  # nobody who counts meets it between the two names
                        os.rename(part, self._folder / key)
                    return
                except OSError as error:
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
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # a power cut must not leave a whole name on half a file

    def _make_room(self, part: Path, needed: int, patience_s: float) -> None:
        """Evicts until `needed` bytes fit, and reserves them by making `part`."""
        waited = 0.0
        while True:
            with self._space():
                shutil.rmtree(part, ignore_errors=True)  # of a process that was killed, or of the attempt before
                while (there := self._used_bytes()).used + needed > self._capacity:
                    if not self._evict_one():
                        break
                else:
                    part.mkdir(exist_ok=True)
                    return
            if waited >= patience_s:
                raise StoreError(
                    f"data.cache_bytes={self._capacity} leaves no room for {needed} bytes of {self._remote.url}: "
                    f"{there.used} bytes in {str(self._folder)!r} are in use, as where another run shares the folder; "
                    "raise it, or give this run another data.cache_dir"
                )
            if self._remote.stopped.wait(POLL_S):
                raise ClosedError
            waited = 0.0 if there.coming else waited + POLL_S  # a download ends, however slow, and can then be evicted

    @contextmanager
    def _space(self) -> Iterator[None]:
        lock = self._lock("space", fcntl.LOCK_EX)
        try:
            yield
        finally:
            os.close(lock)

    def _entries(self) -> Iterator[tuple[os.DirEntry[str], re.Match[str]]]:
        """The cache's own folders, and nothing else that lies in a folder which the user may have put to other use."""
        for entry in os.scandir(self._folder):
            ours = _OURS.fullmatch(entry.name)
            if ours and entry.is_dir(follow_symlinks=False):
                yield entry, ours

    def _used_bytes(self) -> _Used:
        """Of complete shards, and of those to come; what a killed process left half done is removed."""
        used, coming = 0, False
        for entry, ours in self._entries():
            if ours["bytes"] is None:
                used += sum(file.stat().st_size for file in os.scandir(entry.path))
            elif not self._evict(ours["key"], entry.path):
                used, coming = used + int(ours["bytes"]), True
        return _Used(used, coming)

    def _evict_one(self) -> bool:
        """Removes the shard that was used least recently, of those that no process holds."""
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
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            if not folder.endswith(".part"):  # at once out of its place: a half removed shard must not be found there
                os.rename(folder, folder := f"{folder}.0.part")
            shutil.rmtree(folder)
            return True
        finally:
            os.close(lock)

    def close(self) -> None:
        """Ends downloads under way. Waits for none: one that stalls ends at its timeout, or with the process."""
        self._remote.stopped.set()
        self._ahead.close(wait=False)


def cached_bytes(shard: Shard) -> int:
    """The most that a shard takes in the cache."""
    return shard.num_bytes + shard.num_samples * SAMPLE_DTYPE.itemsize + _HEADER_BYTES


def _touch(lock: int) -> None:
    now = time.time_ns()  # left to itself the file system takes a clock that ticks in milliseconds
    os.utime(lock, ns=(now, now))


def _key(shard: Shard) -> str:
    return f"{shard.name}-{shard.sha256[:16]}{shard.samples_sha256[:8]}"
