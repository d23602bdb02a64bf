"""What ends a rank from outside: a request to stop, the same request again, the death of whoever started it.

A thread watches, since Python runs a signal's handler only when the main thread comes back from a collective or a long
C++ call. Nothing but the standard library: it begins before torch is imported.
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
"""In the environment of ranks that launch/supervise.py looks after: its process id."""
GONE = "the supervisor is gone: leaving at once, without a checkpoint"
LOOK_S = 2.0
"""Seconds between two looks at the launcher."""
AGAIN_S = 2.0
"""Seconds after which a signal of the same kind is a second request. Sooner, it is the first, passed on: where a whole
process group is signalled, a rank hears of it from the kernel and from its launcher."""


class Watch:
    """Watches from its construction on; an orphan leaves at once until `on_request` says what a stop is.

    A rank of a supervisor leaves the launcher's death to it, which starts again, and ends at once when it is gone
    itself: its successor, or those of other nodes, wait for the run's folder and go on from the newest checkpoint.
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
        """From now on SIGTERM, SIGINT, SIGUSR1 or the launcher's death calls `request`, which any thread may call; the
        same signal again, from `AGAIN_S` on, leaves with 128 + its number. Call it in the main thread.
        """
        for number in REQUESTS:
            signal.signal(number, lambda *_: request())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)  # a launcher may be started without SIGINT
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
        if not self._seen:  # else it died of what the rank has heard too
            told("the launcher is gone: the run stops within two steps, with a checkpoint")
            self._request()


def opened(pid: int) -> int | None:
    """A descriptor of a process, readable once it has ended; None where the kernel has none (before Linux 5.3)."""
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
    """Says what all ranks of a node hear: on the console once, by the first, and in each one's log."""
    say(line, sys.stderr if os.environ.get("LOCAL_RANK", "0") == "0" else sys.stdout)


def say(line: str, stream: TextIO | None = None) -> None:
    with contextlib.suppress(OSError):  # nobody reads any more
        print(f"rank {os.environ.get('RANK', '0')}: {line}", file=stream or sys.stderr, flush=True)


def leave(code: int, line: str) -> NoReturn:
    say(line)
    os._exit(code)
