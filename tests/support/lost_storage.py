"""Storage that goes and comes back, for real: a file system whose server is gone, or one that is read-only now."""

import ctypes
import logging
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.run_dir import outages

LAZY = 2
"""MNT_DETACH: although files are open."""


class Lost:
    """A folder, and over it, from `go` to `come_back`, a FUSE file system without a server: ENOTCONN."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._libc, self._gone = folder, ctypes.CDLL(None, use_errno=True), False

    def go(self) -> "Lost":
        try:
            server = os.open("/dev/fuse", os.O_RDWR)
        except OSError as error:
            pytest.skip(f"a file system that can be lost needs /dev/fuse: {error.strerror}")
        said = f"fd={server},rootmode=40000,user_id=0,group_id=0".encode()
        mounted = self._libc.mount(b"lost", os.fsencode(self.folder), b"fuse", 0, said)
        os.close(server)
        if mounted != 0:
            pytest.skip(f"a file system that can be lost needs root: {os.strerror(ctypes.get_errno())}")
        self._gone = True
        return self

    def come_back(self) -> None:
        if self._gone:
            self._libc.umount2(os.fsencode(self.folder), LAZY)
        self._gone = False


class ReadOnly:
    """A disk of its own at `folder`, until `end`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=False).returncode:
            pytest.skip("a disk of its own needs the right to mount one")

    def go(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", str(self.folder)], check=True)

    def come_back(self) -> None:
        subprocess.run(["mount", "-o", "remount,rw", str(self.folder)], check=True)

    def end(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


class WhenWaited(logging.Handler):
    """Calls `then` once the program has said that it waits for storage."""

    def __init__(self, then: Callable[[], object]) -> None:
        super().__init__()
        self._then = then
        self.waited = 0

    def emit(self, record: logging.LogRecord) -> None:
        if "cannot be used" in record.getMessage():
            self.waited += 1
            self._then()

    def __enter__(self) -> "WhenWaited":
        logger = logging.getLogger(outages.__name__)
        self._before = logger.level
        logger.setLevel(logging.WARNING)  # a rank other than 0 keeps silent, and a test may have played one here
        logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logger = logging.getLogger(outages.__name__)
        logger.removeHandler(self)
        logger.setLevel(self._before)
