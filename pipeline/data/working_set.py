"""What a node's cache must hold at once: the shards that its ranks read from, and those that they need next.

No rank ever waits for another one's room (see `Shards`), so a smaller cache would not stall. But it would drop shards
that are still in use, and fetch them again and again.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.cache import cached_bytes
from pipeline.data.manifest import Manifest
from pipeline.errors import ConfigError

READ_AHEAD = 2
"""Shards that an evaluation fetches ahead of use."""


def training_shards(
    shard_sizes: Sequence[int], *, window_shards: int, ranks: int, share: int, micro_batch: int, global_batch: int
) -> int:
    """How many shards `ranks` neighbouring ranks need at once, at most, whatever the seed and the epoch.

    That is: the shards of the windows in which their shares of one step lie, and of the windows that each rank needs
    next (`Order.coming`).

    Args:
        shard_sizes: samples in each shard.
        window_shards: 0 for all.
        share: a rank's samples of a global batch.
    """
    total, window = len(shard_sizes), window_shards or len(shard_sizes)
    ascending = np.sort(np.asarray(shard_sizes, dtype=np.int64))
    smallest_window = int(ascending[:window].sum())
    rest = total % window  # shards in the last window of an epoch
    smallest_rest = int(ascending[:rest].sum())
    if window >= total or smallest_window == 0:
        return total

    def most(ends: int, between: int) -> int:
        """Shards of the windows that fit into `between` positions, and of `ends` windows at their ends."""
        whole = (ends + max(0, between) // smallest_window) * window
        if not rest or between < smallest_rest:
            return whole
        return max(whole, (ends + (between - smallest_rest) // smallest_window) * window + rest)

    def touched(positions: int) -> int:
        return most(min(2, positions), positions - 2)

    # What a rank needs next begins less than a global batch behind the window that it is in.
    following = min(ranks * window, most(1, global_batch - 1))
    together, each = touched(ranks * share) + following, ranks * (touched(micro_batch) + window)
    return min(total, together, each)


def evaluation_bytes(manifest: Manifest, *, micro_batch: int, ranks: int) -> int:
    """Bytes that `ranks` ranks of a node need at once, at most, while they evaluate a split; each is at its own place.

    That is: the shards of one micro-batch, and `READ_AHEAD` more.
    """
    num_bytes = np.asarray([cached_bytes(shard) for shard in manifest.shards], dtype=np.int64)
    before = np.concatenate(([0], np.cumsum(num_bytes)))
    ends = np.cumsum([shard.num_samples for shard in manifest.shards])
    first = np.arange(0, manifest.num_samples, micro_batch)
    last = np.minimum(first + micro_batch, manifest.num_samples) - 1
    until = np.minimum(np.searchsorted(ends, last, side="right") + 1 + READ_AHEAD, len(num_bytes))
    of_one = before[until] - before[np.searchsorted(ends, first, side="right")]
    return min(int(num_bytes.sum()), ranks * int(of_one.max(initial=0)))


def least_cache(data: DataConfig, train: Manifest, evaluation: Manifest | None, *, ranks: int, world_size: int) -> int:
    """The smallest `data.cache_bytes` for `ranks` ranks a node: a training, and an evaluation between its steps."""
    sizes = [shard.num_samples for shard in train.shards]
    count = training_shards(
        sizes,
        window_shards=data.window_shards,
        ranks=ranks,
        share=data.global_batch // world_size,
        micro_batch=data.micro_batch,
        global_batch=data.global_batch,
    )
    needed = sum(sorted((cached_bytes(shard) for shard in train.shards), reverse=True)[:count])
    if evaluation is not None:
        needed += evaluation_bytes(evaluation, micro_batch=data.micro_batch, ranks=ranks)
    return needed


def check_cache(data: DataConfig, train: Manifest, evaluation: Manifest | None, *, ranks: int, world_size: int) -> None:
    """Refuses, with a `ConfigError`, a `data.cache_bytes` below `least_cache`."""
    needed = least_cache(data, train, evaluation, ranks=ranks, world_size=world_size)
    if needed > data.cache_bytes:
        of_whom = f"the {ranks} ranks of a node need" if ranks > 1 else "a node of one rank needs"
        raise ConfigError(
            f"data.cache_bytes={data.cache_bytes} does not hold the shards that {of_whom} at once (of the windows that "
            f"are read and the next ones, and of an evaluation between steps); use at least {needed}, or a smaller "
            "data.window_shards"
        )
