"""Event recordings → frames: counts of events by frame, polarity and cell, as spiking networks take them.

    events (t, x, y, p) ─ drop ─ cut into T frames, by time or by count ─ cell of each event ─ count → (T, 2, S, S)

Frames are bare counts, as those of SpikingJelly and tonic: no mean is taken away, and the batch normalisation after the
first convolution takes their scale. `frames` is the definition, `count_into` its fast twin, which `FrameMaker` runs.
DALI has no part in this: it has no operation on events.

- Time: frame k begins at t[0] + k d, where d = (t[-1] - t[0]) // T µs; what follows belongs to the last frame.
- Count: frame k begins at event k n, where n = N // T; what follows belongs to the last frame.
  Both as SpikingJelly's `split_by` time and number; d and n are at least 1, where SpikingJelly fails.
- Cell: the whole sensor is fitted into the frame, its longer side into S cells, its shorter one centred; a sensor of
  less than S pixels is centred and not enlarged. A cell is the sum of its pixels: k x k of them where the longer side
  is k S, else each pixel goes to the one cell in which its upper left corner lies, so that cells differ by a row.
- Shift and mirror: by whole cells; what leaves the frame is lost.
- Drop: each event is kept or not by a hash of its index (Gu et al., "EventDrop", IJCAI 2021: random drop).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data.background import Background
from pipeline.data.decode.augment import uniform
from pipeline.data.decode.events import Events, decode
from pipeline.data.order import mix

POLARITIES = 2
"""Channels of a frame: 0 counts the events of p = 0 (darker), 1 those of p = 1 (brighter)."""
LARGEST_COUNT = 32767
"""A cell holds no larger count: int16 is what is sent to the device, and fp16 holds it. A hot pixel may reach it."""
_FLIP, _SHIFT, _DROP, _KEEP = 16, 17, 18, 19  # hash words that keep these draws independent of order.py's, augment.py's


class Views(NamedTuple):
    """How `n` recordings are looked at."""

    shifts: np.ndarray
    """`(n, 2)` int64: cells that the picture is moved down and right."""
    flips: np.ndarray
    """`(n,)` bool: mirrored left and right, before the shift."""
    drops: np.ndarray
    """`(n,)` float64: the share of events that is dropped, in [0, 1)."""
    keys: np.ndarray
    """`(n,)` uint64: decides which."""


class FrameForm(NamedTuple):
    """The form of the frames of a run."""

    T: int
    """Frames of a recording: `model.T`."""
    size: int
    """S, their side in cells: `data.image_size`."""
    split_by: str
    """time or count: `data.event_frames`."""


def random_views(seed: int, epochs: np.ndarray, samples: np.ndarray, *, shift: int, flip: bool, drop: float) -> Views:
    """Training views of samples `(n,)`: a pure function of (seed, epoch, sample).

    Each shift is uniform in [-shift, shift], each share of dropped events in [0, drop).
    """
    draws = uniform(seed, epochs[:, None], samples[:, None], _SHIFT, np.arange(2)[None])
    return Views(
        shifts=np.floor((2 * shift + 1) * draws).astype(np.int64) - shift,
        flips=(uniform(seed, epochs, samples, _FLIP) < 0.5) & flip,
        drops=drop * uniform(seed, epochs, samples, _DROP),
        keys=mix(seed, epochs, samples, _KEEP),
    )


def whole_views(count: int) -> Views:
    """Evaluation views: every event, where it is."""
    return Views(
        np.zeros((count, 2), np.int64), np.zeros(count, bool), np.zeros(count), np.zeros(count, dtype=np.uint64)
    )


def frames(events: Events, form: FrameForm, views: Views, index: int) -> np.ndarray:
    """The definition: `(T, 2, S, S)` int16 counts of the recording that has view `index`."""
    T, S, split_by = form
    down, right = views.shifts[index]
    kept = [i for i in range(len(events.t)) if not _dropped(views, index, i)]
    times = [int(events.t[i]) for i in kept]
    side = max(events.height, events.width, S)
    top, left = (side - events.height) // 2, (side - events.width) // 2
    counts = np.zeros((T, POLARITIES, S, S), dtype=np.int64)
    for place, i in enumerate(kept):
        if split_by == "time":
            frame = (times[place] - times[0]) // max(1, (times[-1] - times[0]) // T)
        else:
            frame = place // max(1, len(kept) // T)
        row = (top + int(events.y[i])) * S // side
        column = (left + int(events.x[i])) * S // side
        if views.flips[index]:
            column = S - 1 - column
        row, column = row + down, column + right
        if 0 <= row < S and 0 <= column < S:
            counts[min(frame, T - 1), events.p[i], row, column] += 1
    return np.minimum(counts, LARGEST_COUNT).astype(np.int16)


def _dropped(views: Views, index: int, event: int | np.ndarray) -> np.ndarray:
    """Whether the `event`-th event of a recording is dropped."""
    return uniform(views.keys[index], event) < views.drops[index]


def count_into(out: np.ndarray, events: Events, form: FrameForm, views: Views, index: int) -> None:
    """Writes what `frames` returns into `out`, `(T, S, S, 2)` int16.

    Events are in the order of time, so frames are slices of them; the cell of an event is the sum of two table entries,
    and each frame is one `np.bincount`. What leaves the frame is counted in a row and a column beyond it.
    """
    T, S, split_by = form
    t, x, y, p = events.t, events.x, events.y, events.p
    if views.drops[index] > 0:
        kept = ~_dropped(views, index, np.arange(len(t)))
        t, x, y, p = t[kept], x[kept], y[kept], p[kept]
    if len(t) == 0:
        out[...] = 0
        return
    if split_by == "time":
        length = max(1, int(t[-1] - t[0]) // T)
        bounds = np.searchsorted(t, t[0] + length * np.arange(1, T))
    else:
        bounds = np.minimum(max(1, len(t) // T) * np.arange(1, T), len(t))
    side = max(events.height, events.width, S)
    down, right = views.shifts[index]
    rows = _cells(events.height, side, S, mirrored=False, shift=down) * ((S + 1) * POLARITIES)
    columns = _cells(events.width, side, S, mirrored=bool(views.flips[index]), shift=right) * POLARITIES
    cells = rows[y]
    cells += columns[x]
    cells += p
    for k, (start, stop) in enumerate(zip((0, *bounds), (*bounds, len(t)), strict=True)):
        counts = np.bincount(cells[start:stop], minlength=(S + 1) ** 2 * POLARITIES)
        np.minimum(counts.reshape(S + 1, S + 1, POLARITIES)[:S, :S], LARGEST_COUNT, out=out[k], casting="unsafe")


def _cells(pixels: int, side: int, S: int, *, mirrored: bool, shift: int) -> np.ndarray:
    """`(pixels,)` int64: the cell of each row or column of the sensor, S for one that leaves the frame."""
    cells = ((side - pixels) // 2 + np.arange(pixels)) * S // side
    cells = (S - 1 - cells if mirrored else cells) + shift
    return np.where((cells >= 0) & (cells < S), cells, S)


class FrameMaker:
    """Makes the frames of batch after batch.

    Args:
        form: of the frames.
        feed: called by `run`, gives the encoded recordings and views of the next batch; `StopIteration` ends it.
        threads: where recordings are decoded and counted; None does it in the caller's.
    """

    def __init__(
        self, form: FrameForm, feed: Callable[[], tuple[Sequence[np.ndarray], Views]], threads: Background | None
    ) -> None:
        self._form, self._feed, self._threads = form, feed, threads

    def run(self) -> Tensor:
        """The next batch: `(T, n, 2, S, S)` int16 in channels-last memory. The caller may keep it.

        Raises:
            RuntimeError: one of the batch's recordings is damaged.
        """
        encoded, views = self._feed()
        T, S, _ = self._form
        out = np.empty((T, len(encoded), S, S, POLARITIES), dtype=np.int16)

        def one(index: int) -> None:
            count_into(out[:, index], decode(encoded[index]), self._form, views, index)

        try:
            if self._threads is None:
                for index in range(len(encoded)):
                    one(index)
            else:
                for future in [self._threads.submit(one, index) for index in range(len(encoded))]:
                    future.result()
        except ValueError as error:
            raise RuntimeError(f"a recording cannot be decoded: {error}") from None
        return torch.from_numpy(out).permute(0, 1, 4, 2, 3)


def undecodable(encoded: Sequence[np.ndarray]) -> list[int]:
    """Which of a batch's recordings cannot be decoded."""
    culprits = []
    for slot, content in enumerate(encoded):
        try:
            decode(content)
        except ValueError:
            culprits.append(slot)
    return culprits
