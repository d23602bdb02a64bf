"""Locks between processes, and the one that a run has on its folder. Nothing but the standard library.

All are `flock` on an open file or folder: the kernel lets go of it when the last process that has it open dies, however
it dies, so nothing need be cleared up after a kill. Over NFS Linux makes it a lock of the server, which other machines
see; when a machine dies the server frees it after its lease (90 s by default).

Some file systems grant a lock to everybody (sshfs to every machine). So `hold` looks whether a lock excludes, other
nodes do (`excludes`), and RUN/lock also holds a number that each start raises, and a token. Who saves looks at them
first (`watch`): of two runs in one folder the later one ends.

Not `filelock`: it has no shared locks, locks no folder, and does not say who holds a lock.
"""

import errno
import fcntl
import logging
import os
import re
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from pipeline.errors import ConfigError, is_outage
from pipeline.run_dir import outages

log = logging.getLogger(__name__)
PATIENCE_S = 5.0  # a run whose launcher was killed leaves a moment later
POLL_S = 0.1


def take(file: int | IO, *, shared: bool = False) -> bool:
    """Locks an open file, until it is closed; False where another holder is in the way.

    Args:
        shared: beside others that have it shared, not alone. Taken again, the same lock changes its kind.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def wait(file: int | IO, patience_s: float) -> bool:
    """As `take`, alone, after up to `patience_s`."""
    give_up_at = time.monotonic() + patience_s
    while not take(file):
        if time.monotonic() >= give_up_at:
            return False
        time.sleep(POLL_S)
    return True


class Claim(NamedTuple):
    """What the holder of a run's lock has written into it."""

    holder: str
    """`process 12 on host`."""
    number: int
    """Of this start of the run, one above the number that was there."""
    token: str
    """Of this start alone."""

    def __str__(self) -> str:
        return f"{self.holder}\nstart {self.number} {self.token}\n"


def claim(text: str) -> Claim | None:
    """The claim that a lock's content makes; None where it is empty, half written or of another version."""
    said = re.fullmatch(r"(process \d+ on .*)\nstart (\d{1,9}) ([0-9a-f]{16})\n", text)
    return None if said is None else Claim(said[1], int(said[2]), said[3])


def hold(run_dir: str, patience_s: float = PATIENCE_S) -> IO[str]:
    """Takes the lock of a run, RUN/lock, for its rank 0, until the file returned is closed or the process ends.

    A file system without locks, or whose locks exclude nobody, is used without one, with a warning.

    Raises:
        ConfigError: another process has it for `patience_s` or longer; the message names its pid and host.
        StoreError: the folder's storage is gone, and did not come back.
    """
    path = Path(run_dir) / "lock"
    what = f"run_dir={run_dir!r}"
    return outages.outlast(lambda: _hold(path, patience_s), what, was_writable=os.path.exists(path))


def _hold(path: Path, patience_s: float) -> IO[str]:
    was_there = os.path.exists(path)
    try:
        file = path.open("a+", errors="replace")  # for writing, which NFS asks for
    except OSError as error:
        if is_outage(error, was_writable=was_there):
            raise
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another --run_dir") from None
    try:
        if not _locked(file, path, patience_s):
            file.seek(0)
            holder = file.readline().strip() or "another process"
            raise ConfigError(
                f"run_dir={str(path.parent)!r} is in use by {holder}; stop that run and wait for its end, or choose "
                "another --run_dir"
            )
        file.seek(0)
        before = claim(file.read())
        number = before.number + 1 if before is not None else 1
        file.truncate(0)
        file.write(str(Claim(own_name(), number, secrets.token_hex(8))))
        file.flush()
    except BaseException:
        file.close()
        raise
    return file


def own_name() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _locked(file: IO[str], path: Path, patience_s: float) -> bool:
    """Whether the run may have the lock: it has it, or no lock can be had here."""
    try:
        if not wait(file, patience_s):
            return False
        if not excludes(path):
            log.warning("%s", useless(path, "this machine too"))
    except OSError as error:
        if is_outage(error):
            raise
        log.warning("%s cannot be locked (%s): start no second run in this folder", path, error.strerror)
    return True


def excludes(path: Path) -> bool:
    """Whether a lock that is held elsewhere, or by another open file of this process, is refused here.

    Raises:
        OSError: the file cannot be opened, or the file system has no locks.
    """
    with path.open("a+") as other:
        return not take(other)


def useless(path: Path, where: str) -> str:
    """The warning about a lock that `where` could be taken a second time."""
    return (
        f"locks do not exclude on the file system of {path} (it was granted twice, on {where}): start no second run in "
        "this folder, or put it on a file system with locks (NFS 4 without the mount option nolock or local_lock, "
        "CephFS, Lustre with -o flock, GlusterFS)"
    )


def look_from_another_node(run_dir: Path) -> None:
    """Warns where this machine gets the lock that rank 0 holds on another one."""
    path = run_dir / "lock"
    with suppress(OSError):  # rank 0 has said what is wrong with it
        if path.exists() and not excludes(path):
            log.warning("%s", useless(path, "two nodes"))


class Watch:
    """Notices a second run that got into the folder although this one has the lock.

    Made by rank 0, which holds the lock; without one in the folder it watches nothing.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "lock"
        found = _read(self._path)
        self._own = claim(found) if found is not None else None
        if self._own is not None and self._own.holder != own_name():
            raise self._in_use(self._own)

    def check(self) -> None:
        """Call it before the run writes into its folder.

        Raises:
            ConfigError: another run is in the folder, which began earlier.
            OSError: the folder's storage is gone; the folder itself too, if it is no longer there.
        """
        if self._own is None:
            return
        found = _read(self._path)
        if found is None:
            raise OSError(errno.ESTALE, "it is no longer there", str(self._path))
        other = claim(found)
        if other is None or other == self._own:
            return
        if (other.number, other.token) < (self._own.number, self._own.token):
            raise self._in_use(other)
        log.warning("%s has also begun to use %s; it is told to end at its next checkpoint", other.holder, self._path)
        self._path.write_text(str(self._own))

    def _in_use(self, other: Claim) -> ConfigError:
        return ConfigError(
            f"{self._path.parent} is in use by {other.holder} too, which began earlier: locks do not exclude on this "
            "file system; let that run go on, or choose another --run_dir"
        )


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None
