"""What ends a rank from outside: a request to stop, the same request again, the death of its launcher.

A thread watches, since Python runs a signal's handler only when the main thread comes back from a collective or a long
C++ call. Nothing but the standard library: it begins before torch is imported.
"""

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SUPERVISED = "CHISPIKE_SUPERVISED"
"""In the environment of ranks that launch/supervise.py looks after."""
LOOK_S = 2.0
"""Seconds between two looks at the launcher."""


class Watch:
    """Watches from its construction on; an orphan leaves at once until `on_request` says what a stop is."""

    def __init__(self) -> None:
        supervised = SUPERVISED in os.environ  # then whoever started the launcher sees to its orphans, and starts again
        self._launcher = launcher() if "LOCAL_RANK" in os.environ and not supervised else None
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._seen: set[int] = set()
        self._ready = False
        threading.Thread(target=self._watch, name="stops", daemon=True).start()

    def on_request(self, request: Callable[[], None]) -> None:
        """From now on SIGTERM, SIGINT or SIGUSR1 calls `request`; the same signal again leaves with 128 + its number.

        Call it in the main thread.
        """
        for number in REQUESTS:
            signal.signal(number, lambda *_: request())
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)  # written to when a signal comes, not when handled
        self._ready = True

    def _watch(self) -> None:
        while True:
            readable, _, _ = select.select([self._read], [], [], LOOK_S)
            for number in os.read(self._read, 64) if readable else b"":
                self._signalled(number)
            if self._launcher is not None and launcher() != self._launcher:
                self._launcher = None
                if not self._ready:
                    leave(128 + signal.SIGTERM, "the launcher is gone before the run began")
                say("the launcher is gone: the run stops after this step or the next, with a checkpoint")
                os.kill(os.getpid(), signal.SIGTERM)

    def _signalled(self, number: int) -> None:
        if number in self._seen:
            leave(128 + number, f"{signal.Signals(number).name} came again: leaving at once, without a checkpoint")
        if number in REQUESTS and not self._seen:
            name = signal.Signals(number).name
            say(f"{name}: the run stops after this step or the next, with a checkpoint; once more, at once")
        self._seen.add(number)


def launcher() -> tuple[int, int]:
    """Parent and grandparent: of a rank, the two processes of the deepspeed launcher."""
    parent = os.getppid()
    try:
        stat = Path(f"/proc/{parent}/stat").read_text(encoding="utf-8", errors="replace")
        return parent, int(stat.rpartition(")")[2].split()[1])
    except OSError:
        return parent, 0


def say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads any more
        print(f"rank {os.environ.get('RANK', '0')}: {line}", file=sys.stderr, flush=True)


def leave(code: int, line: str) -> None:
    say(line)
    os._exit(code)
