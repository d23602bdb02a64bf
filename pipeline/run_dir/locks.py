"""Locks between processes, and the one that a run has on its folder. Nothing but the standard library.

All are `flock` on an open file or folder: the kernel lets go of it when the last process that has it open dies, however
it dies, so nothing need be cleared up after a kill. Over NFS Linux makes it a lock of the server, which other machines
see; when a machine dies the server frees it after its lease (90 s by default).

Not `filelock`: it has no shared locks, locks no folder, and does not say who holds a lock.
"""

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO

from pipeline.errors import ConfigError

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


def hold(run_dir: str, patience_s: float = PATIENCE_S) -> IO[str]:
    """Takes the lock of a run, RUN/lock, for its rank 0, until the file returned is closed or the process ends.

    A file system without locks is used without one, with a warning.

    Raises:
        ConfigError: another process has it for `patience_s` or longer; the message names its pid and host.
    """
    path = Path(run_dir) / "lock"
    try:
        file = path.open("a+")  # for writing, which NFS asks for
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another --run_dir") from None
    try:
        free = wait(file, patience_s)
    except OSError as error:
        log.warning("%s cannot be locked (%s): start no second run in this folder", path, error.strerror)
        free = True
    if not free:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise ConfigError(
            f"run_dir={run_dir!r} is in use by {holder}; stop that run and wait for its end, or choose another "
            "--run_dir"
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
