"""Waits, for a while, until storage that has gone is back. Nothing but the standard library.

A shared file system whose server restarts answers every call with an error, for seconds or minutes. That is no mistake
of the user, which would end a run for good: the run waits, and then ends with exit code 70, so that it is started
again. `pipeline.errors.OUTAGES` tells such errors from others.
"""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from pipeline.errors import StoreError, is_outage

log = logging.getLogger(__name__)

PATIENCE_S = 120.0
"""How long to wait. GlusterFS notices after 42 s that a server is gone, an NFS server takes back its locks for 90 s."""
POLL_S = 1.0
Result = TypeVar("Result")


def outlast(
    do: Callable[[], Result],
    what: str,
    *,
    was_writable: bool = False,
    pause: Callable[[float], object] | None = None,
) -> Result:
    """The result of `do`, which is called again while the storage that it uses is gone.

    Args:
        do: may be called several times; its other errors pass through.
        what: what it uses, for messages: `run_dir='runs/digits'`.
        was_writable: as for `is_outage`.
        pause: waits for so many seconds, or less; what it raises ends the waiting. By default as `paused_by` says.

    Raises:
        StoreError: the storage was gone for PATIENCE_S.
    """
    began = None
    while True:
        try:
            result = do()
        except OSError as error:
            if not is_outage(error, was_writable=was_writable):
                raise
            now = time.monotonic()
            if began is None:
                began = now
                log.warning("%s cannot be used (%s): waiting up to %g s", what, error.strerror, PATIENCE_S)
            if now - began >= PATIENCE_S:
                raise gone(error, what, now - began) from None
            (pause or _pause)(POLL_S)
        else:
            if began is not None:
                log.warning("%s can be used again, after %.0f s", what, time.monotonic() - began)
            return result


_pause: Callable[[float], object] = time.sleep


@contextmanager
def paused_by(pause: Callable[[float], object]) -> Iterator[None]:
    """How this process waits meanwhile: a supervisor has to notice signals while it waits."""
    global _pause
    before, _pause = _pause, pause
    try:
        yield
    finally:
        _pause = before


def gone(error: OSError, what: str, seconds: float) -> StoreError:
    """The error of storage that did not come back."""
    waited = f", for {seconds:.0f} s now" if seconds else ""
    return StoreError(
        f"{what} cannot be used ({error.strerror}){waited}; bring its storage back, and run again to go on from the "
        "newest checkpoint"
    )


class Lines:
    """A text file that one process appends to. While its storage is gone the text waits in memory.

    Args:
        path: of the file; a file that is there is appended to.
        begin: called before the file is opened, and again while its storage is gone.
        lossy: a log: no error ends what is logged, and of more than MOST_BYTES that wait the oldest are lost.

    Raises:
        StoreError: as `outlast`.
    """

    MOST_BYTES = 1 << 20

    def __init__(self, path: Path, *, begin: Callable[[], object] = lambda: None, lossy: bool = False) -> None:
        self._path, self._lossy = path, lossy
        self._file, self._waiting = -1, b""
        self._gone_at: float | None = None
        self._lock = threading.RLock()

        def opened() -> int:
            begin()
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

        self._file = outlast(opened, str(path), was_writable=os.path.exists(path))
        self._size = os.lseek(self._file, 0, os.SEEK_END)
        """Bytes that are in the file for certain: an outage may leave half of a line behind them."""

    def write(self, text: str) -> None:
        """Appends the text, now or when the storage is back.

        Raises:
            StoreError: the storage has been gone for PATIENCE_S.
            OSError: another error.
        """
        with self._lock:
            self._waiting += text.encode(errors="backslashreplace")
            try:
                self._flush()
            except OSError as error:
                if self._lossy:
                    self._waiting = self._waiting[-self.MOST_BYTES :]
                elif is_outage(error, was_writable=True):
                    self._gone(error)
                else:
                    raise

    def _gone(self, error: OSError) -> None:
        now = time.monotonic()
        if self._gone_at is None:
            self._gone_at = now
            log.warning("%s cannot be used (%s): its lines wait", self._path, error.strerror)
        if now - self._gone_at >= PATIENCE_S:
            raise gone(error, str(self._path), now - self._gone_at) from None

    def _flush(self) -> None:
        try:
            if self._file < 0:
                self._file = self._opened_again()
            while self._waiting:
                written = os.write(self._file, self._waiting)
                self._waiting, self._size = self._waiting[written:], self._size + written
        except OSError:
            self._leave()  # what was opened before an outage may stay dead after it
            raise
        self._gone_at = None

    def _opened_again(self) -> int:
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except FileNotFoundError as error:  # a new one would lie below the place where the storage was
            raise OSError(errno.ESTALE, "it is no longer there", error.filename) from None
        if not self._lossy:
            os.ftruncate(file, min(self._size, os.lseek(file, 0, os.SEEK_END)))
        return file

    def _leave(self) -> None:
        if self._file >= 0:
            with suppress(OSError):
                os.close(self._file)
        self._file = -1

    def close(self) -> None:
        """Writes what waits, and first waits for the storage unless the file is a log; raises as `write`."""
        try:
            if self._waiting and self._lossy:
                self.write("")
            elif self._waiting:
                outlast(self._flush, str(self._path), was_writable=True)
        finally:
            self._leave()
