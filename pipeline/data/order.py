"""The order of the samples: a pure function of (seed, epoch), the same for any number of ranks.

The stream of samples is continuous over epochs: position p is place p mod S of epoch p // S, for a set of S
samples. In an epoch the shards
are permuted, cut into windows of `window_shards`, and the samples within a window are shuffled. Global batch b is
positions [bG, (b+1)G); rank r of R takes its r-th contiguous share of it, in micro-batches of m. So the groups of m
that BatchNorm sees are the same at every R that divides G/m, and a resume only sets a counter.

Permutations sort by keys of a fixed integer hash: they stay the same when a library changes its random generator.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.errors import DataError

_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_STEP = np.uint64(0x9E3779B97F4A7C15)
_SHARDS, _SAMPLES, _REPLACEMENT = 0, 1, 4  # hash words that keep these draws independent; decode/ uses the others


def mix(*words: int | np.ndarray) -> np.ndarray:
    """A 64-bit hash of a tuple of words, element by element: SplitMix64 (Steele, Lea and Flood 2014), word by word."""
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
        seed: for the permutations.
        window_shards: shards that are shuffled together; 0 for all.
    """

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, window_shards: int) -> None:
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._first = np.concatenate(([0], np.cumsum(self._sizes)))[:-1]
        self._seed, self._window_shards = seed, window_shards or len(self._sizes)
        self.num_samples = int(self._sizes.sum())
        if self.num_samples == 0:
            raise DataError("the shard set holds no samples; make it again with python -m data_prep")
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
            offset, members = self._window_at(epoch, place)
            taken = members[offset : offset + count - done]
            epochs[done : done + len(taken)] = epoch
            numbers[done : done + len(taken)] = taken
            done += len(taken)
        return epochs, numbers

    def replacement(self, position: int, attempt: int) -> int:
        """The `attempt`-th candidate to replace a bad sample: from the same window, whose shards are there already."""
        epoch, place = divmod(position, self.num_samples)
        _, members = self._window_at(epoch, place)
        return int(members[int(mix(self._seed, epoch, _REPLACEMENT, place, attempt)[0] % np.uint64(len(members)))])

    def shards_at(self, position: int) -> np.ndarray:
        """The shards of the window that holds a stream position."""
        epoch, place = divmod(position, self.num_samples)
        self._plan(epoch)
        window = self._window_number(place)
        return self._shards[window * self._window_shards : (window + 1) * self._window_shards]

    def coming(self, first: int, last: int, *, share: int, global_batch: int) -> list[int]:
        """The shards of the windows of positions `first` to `last`, then those of the window that the rank needs next.

        `first` and `last` lie in the rank's `share` of a global batch. If global batches are larger than windows, the
        rank skips windows: the next one is the first that holds a sample of its share of this or a later batch.
        """
        end, here = first, [first]
        while (end := self._window_end(end)) <= last:
            here.append(end)
        offset = first % global_batch // share * share  # where the rank's share of each global batch begins
        step = -((offset + share - end - 1) // global_batch)  # the first whose share reaches `end`, rounded up
        following = max(end, step * global_batch + offset)
        return list(dict.fromkeys(int(shard) for at in (*here, following) for shard in self.shards_at(at)))

    def _window_end(self, position: int) -> int:
        """The stream position at which the window of `position` is over."""
        epoch, place = divmod(position, self.num_samples)
        self._plan(epoch)
        end = epoch * self.num_samples + int(self._starts[self._window_number(place) + 1])
        assert end > position  # so a caller that goes from window to window advances
        return end

    def _permuted_shards(self, epoch: int) -> np.ndarray:
        return np.argsort(mix(self._seed, epoch, _SHARDS, np.arange(len(self._sizes))), kind="stable")

    def _plan(self, epoch: int) -> None:
        """Computes the order of shards and the window starts of `epoch`, and makes it the current epoch."""
        if epoch == self._epoch:
            return
        self._epoch, self._shards = epoch, self._permuted_shards(epoch)
        sizes = self._sizes[self._shards]
        window_sizes = np.add.reduceat(sizes, np.arange(0, len(sizes), self._window_shards))
        self._starts = np.concatenate(([0], np.cumsum(window_sizes)))

    def _window_number(self, place: int) -> int:
        return int(np.searchsorted(self._starts, place, side="right")) - 1

    def _window_at(self, epoch: int, place: int) -> tuple[int, np.ndarray]:
        """`place` counted from the start of its window, and the window's samples in order."""
        self._plan(epoch)
        window = self._window_number(place)
        key = (epoch, window)
        if key not in self._windows:
            if len(self._windows) >= 2:  # a micro-batch may lie in two windows; older ones are not needed again
                self._windows.pop(next(iter(self._windows)))
            self._windows[key] = self._shuffled(epoch, window)
        return place - int(self._starts[window]), self._windows[key]

    def _shuffled(self, epoch: int, window: int) -> np.ndarray:
        shards = self._shards[window * self._window_shards : (window + 1) * self._window_shards]
        numbers = np.concatenate([np.arange(int(self._sizes[s])) + self._first[s] for s in shards])
        return numbers[np.argsort(mix(self._seed, epoch, _SAMPLES, numbers), kind="stable")]
