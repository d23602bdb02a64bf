"""Which sample comes when: a pure function of (seed, epoch), the same for any number of ranks.

The stream of samples is continuous over epochs: position p is place p mod S of epoch p // S. In an epoch the shards
are permuted, cut into windows of `window_shards`, and the samples within a window are shuffled. Global batch b is
positions [bG, (b+1)G); rank r of R takes its r-th contiguous share of it, in micro-batches of m. So the groups of m
that BatchNorm sees are the same at every R that divides G/m, and to resume is to set a counter.

Permutations sort by keys of a fixed integer hash: they stay what they are when a library changes its generator.
"""

from collections.abc import Sequence

import numpy as np

_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_STEP = np.uint64(0x9E3779B97F4A7C15)


def mix(*words: int | np.ndarray) -> np.ndarray:
    """A 64-bit hash of a tuple of words, element by element; SplitMix64's finalizer applied word by word."""
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        addend = np.atleast_1d(np.asarray(word)).astype(np.uint64)
        state = (state ^ addend) + _STEP  # wraps around, as arrays of uint64 do
        state = (state ^ (state >> np.uint64(30))) * _MULTIPLIERS[0]
        state = (state ^ (state >> np.uint64(27))) * _MULTIPLIERS[1]
        state = state ^ (state >> np.uint64(31))
    return state


class Order:
    """The order of a set of shards.

    Args:
        shard_sizes: samples in each shard, in the manifest's order.
        seed: of the permutations.
        window_shards: shards that are shuffled together; 0 for all.
    """

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, window_shards: int) -> None:
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._first = np.concatenate(([0], np.cumsum(self._sizes)))[:-1]
        self._seed, self._window_shards = seed, window_shards or len(self._sizes)
        self.num_samples = int(self._sizes.sum())
        self._epoch: int | None = None
        self._shards = self._sizes
        self._starts = self._sizes
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def samples(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Epoch and sample number at stream positions [start, start + count): two `(count,)` int64 arrays."""
        epochs = np.empty(count, dtype=np.int64)
        numbers = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch, place = divmod(start + done, self.num_samples)
            window, offset, members = self._find(epoch, place)
            del window
            taken = members[offset : offset + count - done]
            epochs[done : done + len(taken)] = epoch
            numbers[done : done + len(taken)] = taken
            done += len(taken)
        return epochs, numbers

    def _find(self, epoch: int, place: int) -> tuple[int, int, np.ndarray]:
        """The window that holds `place` of `epoch`, the place within it, and its samples in order."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._shards = np.argsort(mix(self._seed, epoch, 0, np.arange(len(self._sizes))), kind="stable")
            sizes = self._sizes[self._shards]
            ends = np.add.reduceat(sizes, np.arange(0, len(sizes), self._window_shards))
            self._starts = np.concatenate(([0], np.cumsum(ends)))
        window = int(np.searchsorted(self._starts, place, side="right")) - 1
        if (epoch, window) not in self._windows:
            if len(self._windows) >= 2:
                self._windows.pop(next(iter(self._windows)))
            self._windows[epoch, window] = self._shuffled(epoch, window)
        return window, place - int(self._starts[window]), self._windows[epoch, window]

    def _shuffled(self, epoch: int, window: int) -> np.ndarray:
        shards = self._shards[window * self._window_shards : (window + 1) * self._window_shards]
        numbers = np.concatenate([np.arange(self._sizes[s]) + self._first[s] for s in shards])
        return numbers[np.argsort(mix(self._seed, epoch, 1, numbers), kind="stable")]
