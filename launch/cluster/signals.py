"""Signals as a queue: nothing happens inside a handler, so nothing is interrupted half-way."""

import select
import signal
import socket
import time

from pipeline.ranks.stop_requests import AGAIN_S

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Signals:
    """Collects STOPS; `wait` returns at once on them and when a child ends. PID 1, which has no default handlers, too.

    Made once, in the main thread; `close()` restores the handlers of before.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._before = {number: signal.signal(number, _note) for number in (*STOPS, signal.SIGCHLD)}
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self.seen: list[int] = []
        """The stops that have come, in order."""
        self.urgent = False
        """SIGTERM or SIGINT has come again, `AGAIN_S` or more after the first. A sooner one is the same request, sent
        to the whole process group and also passed on. SIGUSR1 does not count: Slurm sends it as an early warning."""
        self._asked_at: float | None = None
        self.looked_at = time.monotonic()
        """When `wait` was last called; a loop that runs calls it often (health.ROUND_S)."""

    def wait(self, seconds: float) -> None:
        """Returns after `seconds`, or sooner on a signal."""
        self.looked_at = time.monotonic()
        if not select.select([self._reader], [], [], seconds)[0]:
            return
        now, stops = time.monotonic(), [number for number in self._reader.recv(4096) if number in STOPS]
        self.seen += stops
        if any(number != signal.SIGUSR1 for number in stops):
            self._asked_at = now if self._asked_at is None else self._asked_at
            self.urgent = self.urgent or now - self._asked_at >= AGAIN_S

    def pause(self, seconds: float) -> None:
        """As `wait`; raises InterruptedError once a request to stop has come."""
        self.wait(seconds)
        if self.seen:
            raise InterruptedError

    @property
    def first(self) -> str:
        return signal.Signals(self.seen[0]).name

    def close(self) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._reader.close()
        self._writer.close()


def _note(_number: int, _frame) -> None:
    """The byte in the wake-up socket is the message."""
