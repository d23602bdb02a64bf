"""One run at a time in a run's folder. Standard library only.

Rank 0 holds `flock` on RUN/lock while it lives. The kernel frees the lock when the process dies, so a kill leaves
nothing to clean up. Over NFS, Linux makes it a lock of the server, which other machines see; when a machine dies, the
server frees it after its lease (90 s by default). On a file system without locks, the run warns and takes none.
"""

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from pipeline.errors import ConfigError

log = logging.getLogger(__name__)
PATIENCE_S = 5.0  # a run whose launcher was killed ends a moment later


def hold(run_dir: str, patience_s: float = PATIENCE_S) -> TextIO:
    """Takes the lock of `run_dir`; it is held until the returned file is closed or the process ends.

    Raises:
        ConfigError: another process has it for `patience_s` or longer; the message names its pid and host.
    """
    path = Path(run_dir) / "lock"
    try:
        file = path.open("a+")  # NFS locks only a file that is open for writing
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another --run_dir") from None
    give_up_at = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                log.warning("%s cannot be locked (%s): start no second run in this folder", path, error.strerror)
                break
        if time.monotonic() >= give_up_at:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ConfigError(
                f"run_dir={run_dir!r} is in use by {holder}; stop that run and wait for its end, or choose another "
                "--run_dir"
            )
        time.sleep(0.1)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
