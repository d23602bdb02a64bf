"""What the readers of event recordings share: the events as they lie in a file, and the clocks of cameras."""

from dataclasses import dataclass, field

import numpy as np

from data_prep.images import RefusedError

TIME_UNITS = {"us": 1, "ms": 1_000, "s": 1_000_000}
"""Microseconds of each unit that times in .npz and .npy may have."""
SORTED, INVALID, UNTIMED = (
    "events out of the order of time were sorted",
    "events marked as invalid, or of no pixel, were left out",
    "events before the first time of the file were left out",
)
"""Warnings of recordings that are kept."""
DVS128 = (128, 128)
"""Width and height of this camera's sensor."""
MAX_HEADER = 4 << 20
"""Bytes of a header of text; jAER writes all its preferences into one."""
_JITTER_US = 1 << 16  # that events may come late


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What files do not say of themselves."""

    sensor: tuple[int, int] | None = None
    """Width and height; None: as the file or its format says."""
    time_unit: str = "us"
    """Of .npz and .npy, a key of `TIME_UNITS`."""

    def __str__(self) -> str:
        size = "as the files say" if self.sensor is None else "{}x{}".format(*self.sensor)
        return f"--sensor {size}, --time-unit {self.time_unit}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Raw:
    """What lies in a file, in its order."""

    t: np.ndarray
    """int64, in µs from any point."""
    x: np.ndarray
    y: np.ndarray
    p: np.ndarray
    """0 and 1, or -1 and 1."""
    format: str
    sensor: tuple[int, int] | None = None
    """Width and height, where the file or its format says them."""
    guessed_sensor: bool = False
    """Whether files of this format may be of others."""
    warnings: dict[str, int] = field(default_factory=dict)
    """Of how many events each warning is."""


def unwrapped(t: np.ndarray, bits: int, jitter: int = _JITTER_US) -> np.ndarray:
    """`t` as int64 without the wraps of a counter of so many bits: a fall by more than half its range is one.

    A rise is a quiet time, however long. Only across a wrap, from within `jitter` behind it to within `jitter` before
    it, a rise is an event that comes late.
    """
    t, size = t.astype(np.int64), 1 << bits
    turns = np.zeros(len(t), np.int64)
    turns[1:] = t[1:] - t[:-1] < -size // 2
    turns[1:] -= (t[:-1] < jitter) & (t[1:] >= size - jitter) & (np.cumsum(turns)[:-1] > 0)
    return t + np.cumsum(turns) * size


def warned(text: str, events: np.ndarray) -> dict[str, int]:
    """`text` with the number of those of the `events` that it is about; nothing where it is about none."""
    num = int(np.count_nonzero(events))
    return {text: num} if num else {}


def whole(data: memoryview, at: int, dtype: np.dtype | str, what: str) -> np.ndarray:
    """The records from byte `at` to the end; `RefusedError` where the last is cut."""
    size = np.dtype(dtype).itemsize
    if rest := (len(data) - at) % size:
        raise RefusedError(f"truncated: {rest} bytes behind the last whole {what} of {size} bytes")
    return np.frombuffer(data, dtype=dtype, offset=at)


def text_header(data: memoryview, mark: bytes, last: bytes | None = None) -> tuple[bytes, int]:
    """The lines at the start that begin with `mark`, up to the one that is `last`, and the offset behind them."""
    head, at = bytes(data[:MAX_HEADER]), 0
    while head[at : at + 1] == mark:
        start, at = at, head.find(b"\n", at) + 1
        if not at:
            over = f"its header has more than {MAX_HEADER} bytes; remove the longest lines of it"
            raise RefusedError("truncated: it ends in its header" if len(head) == len(data) else over)
        if last is not None and head[start:at].strip() == last:
            break
    return head[:at], at
