"""Requests to stop, from outside the job."""

import signal

from pipeline.chi.allreduce import SIGNALS, Tap

STOP = SIGNALS.index("stop")


def stop_on_signal(tap: Tap) -> None:
    """SIGTERM, SIGINT or SIGUSR1 to any rank stops all after the step; the same signal again leaves at once."""

    def request(number: int, _frame) -> None:
        tap.signals[STOP] = 1
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, request)
