"""Tracks who scrapes a node's metrics regularly, and waits until all have scraped once more. Standard library only."""

import math
import threading
import time
from collections.abc import Callable
from itertools import pairwise

MAX_INTERVAL_S = 90.0
"""Longest interval of a Prometheus that is waited for: a minute, and what may delay a scrape."""
GRACE_S = 5.0
"""Extra wait after an interval, since no scrape comes exactly on time."""
STOPPED_S = 20.0
"""Longest wait after a request to stop: Kubernetes and Slurm kill soon. Enough for a scrape every 15 s."""
LOOK_S = 0.2
"""Between two looks at whether a wait has become urgent."""
KEPT = 4
"""Scrapes of a client that are remembered: so many that the short gap after a late scrape is not its interval."""
MAX_CLIENTS = 16
"""Clients that are remembered, the latest; two replicas of Prometheus are usual."""


class Scrapers:
    """The clients by address. `came` is called in the server's thread, `wait` in another; times are monotonic."""

    def __init__(self) -> None:
        self._times: dict[str, list[float]] = {}
        self._changed = threading.Condition()

    def came(self, client: str, now: float) -> None:
        with self._changed:
            times = self._times.pop(client, [])
            self._times[client] = [*times[1 - KEPT :], now]
            for oldest in list(self._times)[:-MAX_CLIENTS]:
                del self._times[oldest]
            self._changed.notify_all()

    def intervals(self, now: float) -> dict[str, float]:
        """By client, the longest of its last intervals; only clients that scrape regularly, and still do."""
        with self._changed:
            gaps = {
                client: max(later - earlier for earlier, later in pairwise(times))
                for client, times in self._times.items()
                if len(times) > 1
            }
            return {
                client: gap
                for client, gap in gaps.items()
                if gap <= MAX_INTERVAL_S and now - self._times[client][-1] < 2 * gap + GRACE_S
            }

    def wait(self, at_most_s: float = math.inf, urgent: Callable[[], bool] = lambda: False) -> None:
        """Returns when every regular client has scraped once more, at most after the longest interval and GRACE_S.

        It also returns after `at_most_s` seconds, and soon after `urgent` is true.
        """
        began = time.monotonic()
        expected = self.intervals(began)
        end = began + min(max(expected.values(), default=0.0) + GRACE_S, at_most_s)
        with self._changed:
            while not all(self._times.get(client, [began])[-1] > began for client in expected):
                left = end - time.monotonic()
                if left <= 0 or urgent():
                    return
                self._changed.wait(min(left, LOOK_S))
