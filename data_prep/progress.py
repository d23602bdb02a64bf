"""One line that says how far the work is: images, images/s, MB/s, time left."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from pipeline.data.manifest import EVENTS, IMAGES

NOUNS = {IMAGES: "images", EVENTS: "recordings"}
"""What the samples of each kind of set are called in messages."""
_EVERY_S_TERMINAL = 0.25
_EVERY_S_LOG = 10.0


def duration(seconds: float) -> str:
    """`seconds` as 42 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(num_bytes: float) -> str:
    """`num_bytes` in the decimal unit that fits."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB" if num_bytes < 9999.5 else f"{num_bytes:,.0f} GB"


class Progress:
    """Counts samples and bytes and writes a line to stderr: rewritten in place on a terminal, every 10 s in a log.

    Args:
        num_samples: how many there are to do, without those that an earlier run did.
        verb: what is done to them, as a participle: packed.
        noun: what they are: images, recordings.
        clock: monotonic, in seconds.
    """

    def __init__(
        self,
        num_samples: int,
        verb: str,
        stream: TextIO = sys.stderr,
        clock: Callable[[], float] = time.monotonic,
        noun: str = "images",
    ) -> None:
        self._total, self._verb, self._stream, self._clock, self._noun = num_samples, verb, stream, clock, noun
        self._terminal = stream.isatty()
        self._start = self._shown = clock()
        self.samples = 0
        self.bytes = 0

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._start

    def add(self, samples: int, num_bytes: int) -> None:
        self.samples += samples
        self.bytes += num_bytes
        self.show()

    def line(self) -> str:
        """The current state in words."""
        if not self._total:
            return f"no {self._noun.removesuffix('s')} was left to be {self._verb}"
        seconds = max(self.elapsed_s, 1e-9)
        rate = self.samples / seconds
        left = f", {duration((self._total - self.samples) / rate)} left" if 0 < self.samples < self._total else ""
        speed = f"{rate:,.0f} {self._noun}/s, {self.bytes / seconds / 1e6:,.0f} MB/s"
        return f"{self._verb} {self.samples:,} of {self._total:,} {self._noun}, {speed}{left}"

    def show(self) -> None:
        """Writes the line if the last one is old enough."""
        every = _EVERY_S_TERMINAL if self._terminal else _EVERY_S_LOG
        if self._clock() - self._shown < every:
            return
        self._shown = self._clock()
        self._stream.write(f"\r\033[K{self.line()}" if self._terminal else f"{self.line()}\n")
        self._stream.flush()

    def close(self) -> None:
        """Ends the line that a terminal shows."""
        if self._terminal:
            self._stream.write("\r\033[K")
            self._stream.flush()
