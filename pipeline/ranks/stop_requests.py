"""What ends a rank from outside: a request to stop, a repeated request, the death of its launcher or supervisor.

A thread watches, since Python runs a signal's handler only when the main thread comes back from a collective or a long
C++ call. Standard library only: the watch begins before torch is imported.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TextIO

REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SUPERVISED = "CHISPIKE_SUPERVISED"
"""Environment variable of ranks that launch/supervise.py started: the process id of the supervisor."""
GONE = "the supervisor is gone: leaving at once, without a checkpoint"
LOOK_S = 2.0
"""Seconds between two checks of the launcher."""
AGAIN_S = 2.0
"""Seconds after which the same signal is a second request. Before, it is the first one, passed on: if a whole process
group is signalled, a rank gets the signal from the kernel and from its launcher."""


class Watch:
    """Watches from its construction on. Before `on_request` is called, a rank without its launcher ends at once.

    A rank under a supervisor ignores the death of the launcher: the supervisor starts the ranks again. It ends at once
    when the supervisor is gone: the next one, or those of other nodes, wait for the run's folder and continue from the
    newest checkpoint.
    """

    def __init__(self) -> None:
        supervisor = os.environ.get(SUPERVISED)
        self._supervisor = None if supervisor is None else opened(int(supervisor))
        self._launcher = launcher() if "LOCAL_RANK" in os.environ and supervisor is None else None
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._seen: dict[int, float] = {}
        self._request: Callable[[], None] | None = None
        threading.Thread(target=self._watch, name="stops", daemon=True).start()

    def on_request(self, request: Callable[[], None]) -> None:
        """From now on SIGTERM, SIGINT, SIGUSR1 or the launcher's death calls `request`, from any thread. The same
        signal again, after `AGAIN_S` or more, ends the process with 128 + its number. Call this in the main thread.
        """
        for number in REQUESTS:
            signal.signal(number, lambda *_: request())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)  # the launcher may have been started with SIGINT blocked
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)  # written to when a signal comes, not when handled
        self._request = request

    def _watch(self) -> None:
        while True:
            watched = [self._read] + ([] if self._supervisor is None else [self._supervisor])
            readable, _, _ = select.select(watched, [], [], LOOK_S)
            for number in os.read(self._read, 64) if self._read in readable else b"":
                if number in REQUESTS:
                    self._signalled(number)
            if self._supervisor in readable:
                leave(128 + signal.SIGTERM, GONE)
            if self._launcher is not None and launcher() != self._launcher:
                self._launcher = None
                self._left_alone()

    def _signalled(self, number: int) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if now - self._seen.get(number, now) >= AGAIN_S:
            leave(128 + number, f"{name} came again: leaving at once, without a checkpoint")
        if not self._seen:
            told(f"{name}: the run stops within two steps, with a checkpoint; once more (after {AGAIN_S:g} s), at once")
        self._seen.setdefault(number, now)

    def _left_alone(self) -> None:
        if self._request is None:
            leave(128 + signal.SIGTERM, "the launcher is gone before the run began")
        if not self._seen:  # else the launcher died of the signal that the rank got too
            told("the launcher is gone: the run stops within two steps, with a checkpoint")
            self._request()


def opened(pid: int) -> int | None:
    """A descriptor of a process, readable once it has ended; None if the kernel has none (before Linux 5.3)."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        leave(128 + signal.SIGTERM, GONE)
    except OSError:
        return None


def launcher() -> tuple[int, int]:
    """Parent and grandparent: of a rank, the two processes of the deepspeed launcher."""
    parent = os.getppid()
    try:
        stat = Path(f"/proc/{parent}/stat").read_text(encoding="utf-8", errors="replace")
        return parent, int(stat.rpartition(")")[2].split()[1])
    except OSError:
        return parent, 0


def told(line: str) -> None:
    """Says what all ranks of a node notice: on the console once, by the node's first rank, and in each rank's log."""
    say(line, sys.stderr if os.environ.get("LOCAL_RANK", "0") == "0" else sys.stdout)


def say(line: str, stream: TextIO | None = None) -> None:
    with contextlib.suppress(OSError):  # the reader is gone
        print(f"rank {os.environ.get('RANK', '0')}: {line}", file=stream or sys.stderr, flush=True)


def leave(code: int, line: str) -> NoReturn:
    say(line)
    os._exit(code)
