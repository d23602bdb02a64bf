"""The evaluation stream of a shard set, for one rank: every sample once, in the middle of its image."""

import atexit
from collections.abc import Generator
from functools import partial

import numpy as np
import torch

from pipeline.config import DataConfig
from pipeline.data.augment import central_windows
from pipeline.data.bad import BadSamples, refuse
from pipeline.data.loader import end, open_shards, sizes
from pipeline.data.samples import Samples
from pipeline.data.splits import EVALUATION
from pipeline.data.stream import Batch, Request, Stream
from pipeline.data.working_set import READ_AHEAD


def evaluation_batches(
    data: DataConfig, *, rank: int, world_size: int, device: torch.device, split: str = EVALUATION
) -> Generator[Batch, None, None]:
    """Every sample of a split exactly once over all ranks; each rank gets the same number of batches.

    Padding and bad samples are not `valid`: another sample of the split fills their place.

    Raises:
        ConfigError, DataError: as `Loader`; also when this rank's bad samples alone are over `data.max_bad_ratio`.
    """
    shards, m = open_shards(data, split), data.micro_batch
    samples, bad = Samples(shards), BadSamples()
    total = shards.manifest.num_samples
    per_rank = -(-total // (m * world_size))

    def request(index: int) -> Request:
        position = (rank * per_rank + index) * m
        places = position + np.arange(m)
        valid = places < total
        filled = np.minimum(places, total - 1)  # padding and stand-ins are of shards at hand: none is fetched for them
        owners = shards.owners(filled[[0, -1]])
        ahead = owners[1] + 1 + READ_AHEAD
        shards.expect(range(owners[0], min(ahead, len(shards.manifest.shards))), once=True)
        taken = samples.take(filled, lambda slot, attempt: (int(filled[slot]) - 1 - attempt) % total)
        valid[list(taken.bad)] = False
        reported = [
            (samples.name(number), samples.bad[number], "it does not count in the evaluation")
            for slot, number in taken.bad.items()
            if places[slot] < total
        ]
        shards.rest()
        return Request(
            index=index,
            numbers=taken.numbers,
            encoded=taken.encoded,
            windows=central_windows(
                sizes(taken), image_size=data.image_size, resize=data.eval_resize or data.image_size
            ),
            labels=taken.records["label"].astype(np.int64),
            valid=valid,
            position=position,
            bad=reported,
        )

    stream = Stream(data, device, samples, request, bad)
    close = partial(end, stream, shards)
    atexit.register(close)  # of an evaluation that nobody finished
    try:
        yield from stream.run(range(per_rank))
        refuse(bad.reasons, count=bad.count, seen=total, num_samples=total, max_ratio=data.max_bad_ratio)
    finally:
        atexit.unregister(close)
        close()
