"""The two streams of batches for one rank, from a shard set: one for training, one for evaluation.

Order → sample numbers → Samples → files and views → Stream → Batch
"""

import atexit
import logging
from collections.abc import Generator, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from pipeline.config import DataConfig
from pipeline.data.cache import READ_AHEAD, check_cache
from pipeline.data.decode import mixup
from pipeline.data.decode.augment import image_size_at
from pipeline.data.decode.kinds import Kind, kind_of
from pipeline.data.manifest import EVALUATION, TRAIN, check_flip, check_kind, load_manifest
from pipeline.data.order import Order
from pipeline.data.prefetcher import Batch, Request, Stream
from pipeline.data.remote import join
from pipeline.data.samples import BadSamples, Samples, refuse, too_many
from pipeline.data.shard_reader import Shards
from pipeline.errors import ConfigError
from pipeline.ranks.cores import local_ranks

__all__ = ["Batch", "Loader"]

log = logging.getLogger(__name__)


class Figures(NamedTuple):
    """Figures of one rank's loading since its start."""

    wait_s: float
    queue_depth: int
    """Decoded micro-batches that wait for their step."""
    bytes_read: int
    bad: dict[str, int]
    """Samples replaced, by reason."""
    image_size: int
    """Side of the last step's images, in pixels."""


class Loader:
    """The training split's stream for one rank.

    Args:
        data: the data configuration. This rank's share of a step is `global_batch` / `world_size`, in micro-batches.
        seed: for the order and the augmentation.
        rank, world_size: this rank's place.
        device: where batches go; a CUDA device decodes on the GPU.
        split: folder of the shard set below `data.path`.
        dtype: of the images; bfloat16 halves their memory where the network computes in bf16.
        T: frames of a recording, for a set of event data.

    Raises:
        ConfigError: there is no such set, `data` has options of another kind of samples, mirroring would change labels,
            or the batch does not divide over the ranks.
        DataError: the set is damaged.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device,
        split: str = TRAIN,
        dtype: torch.dtype = torch.float32,
        T: int | None = None,
    ) -> None:
        self._data, self._seed, self._rank = data, seed, rank
        self._share = data.global_batch // world_size
        self._accumulation = self._share // data.micro_batch
        if self._accumulation * data.micro_batch * world_size != data.global_batch:
            raise ConfigError(
                f"data.global_batch={data.global_batch} does not divide over {world_size} ranks in micro-batches of "
                f"{data.micro_batch}; use a multiple of {data.micro_batch * world_size}"
            )
        self._shards = open_shards(data, split)
        self._samples = Samples(self._shards)
        self.manifest = self._shards.manifest
        check_kind(data, self.manifest)
        check_flip(data, self.manifest)
        self._kind = kind_of(self.manifest, data, seed=seed, device=device, T=T)
        self._order = Order(
            [shard.num_samples for shard in self.manifest.shards], seed=seed, window_shards=data.window_shards
        )
        self._check_cache(local_ranks(world_size), world_size)
        self.bad = BadSamples()
        """The samples that this rank replaced; on rank 0 the count starts from that of all ranks before the resume."""
        self._bad_count = self._bad_step = self._bad_from_step = self._bad_earlier = 0
        self._stream = Stream(data, self._kind, device, self._samples, self._request, self.bad, dtype)
        self._step = self._left = 0
        atexit.register(self.close)  # runs before DALI's own exit handler, which aborts if a thread is in a pipeline

    @property
    def wait_s(self) -> float:
        """Seconds that the training loop has waited for data."""
        return self._stream.wait_s

    @property
    def step(self) -> int:
        """Number of steps whose batches were all handed out: the step at which a resume goes on."""
        return self._step

    def figures(self) -> Figures:
        return Figures(
            wait_s=self.wait_s,
            queue_depth=self._stream.queue_depth,
            bytes_read=self._shards.bytes_read,
            bad=dict(self.bad.by_reason),
            image_size=self._image_size(max(0, self._step - 1)),
        )

    def _image_size(self, step: int) -> int:
        return image_size_at(self._data, step * self._data.global_batch // self._order.num_samples)

    def steps(self, start: int, stop: int) -> Iterator[Iterator[Batch]]:
        """The micro-batches of each optimizer step in [start, stop), read and decoded ahead of use.

        Raises:
            RuntimeError: a step was asked for before all micro-batches of the step before it were taken: it would
                get the ones that are left.
        """
        batches = self._stream.run(range(start * self._accumulation, stop * self._accumulation))
        for step in range(start, stop):
            self._left = self._accumulation
            yield self._micro_batches(batches, step)
            if self._left:
                raise RuntimeError(
                    f"step {step + 1} was asked for while {self._left} of the {self._accumulation} micro-batches of "
                    f"step {step} were not taken; take all of them first, or call steps(start, stop) again"
                )

    def _micro_batches(self, batches: Iterator[Batch], step: int) -> Iterator[Batch]:
        for left in reversed(range(self._accumulation)):
            batch = self._mixed(next(batches))
            self._left = left
            if left == 0:  # so that a state saved in the loop body after this step resumes at the next one
                self._step = step + 1
            yield batch

    def _mixed(self, batch: Batch) -> Batch:
        """The batch after mixup or cutmix, where they are on."""
        images, labels = batch.images, batch.labels
        mixing = mixup.draw(self._data, self._seed, batch.position, images.shape[-2], images.shape[-1])
        if mixing is None:
            return batch
        partners = mixup.partners_on(mixing, images.device)
        return batch._replace(
            images=mixup.mixed_images(images, mixing, partners),
            labels=mixup.main_labels(labels, mixing, partners),
            mixed=mixup.mixed_targets(labels, mixing, partners, len(self.manifest.classes)),
        )

    def _request(self, micro_batch: int) -> Request:
        """The rank's `micro_batch`-th micro-batch of the run."""
        m = self._data.micro_batch
        step, within = divmod(micro_batch, self._accumulation)
        position = step * self._data.global_batch + self._rank * self._share + within * m
        if self._shards.is_cached:  # local shards stay open: a window may lie anywhere in the set
            last, global_batch = position + m - 1, self._data.global_batch
            self._shards.expect(self._order.coming(position, last, share=self._share, global_batch=global_batch))
        epochs, numbers = self._order.samples(position, m)
        taken = self._samples.take(numbers, lambda slot, attempt: self._order.replacement(position + slot, attempt))
        views = self._kind.random_views(epochs, taken.numbers, taken.records, self._image_size(step))
        bad = [
            (
                self._samples.name(number),
                self._samples.bad[number],
                f"{self._samples.name(int(taken.numbers[slot]))} stands in for it at position {position + slot}",
            )
            for slot, number in taken.bad.items()
        ]
        self._shards.rest()
        return Request(
            index=micro_batch,
            numbers=taken.numbers,
            encoded=taken.encoded,
            views=views,
            labels=taken.records["label"].astype(np.int64),
            valid=np.ones(m, dtype=bool),
            position=position,
            bad=bad,
        )

    def _check_cache(self, ranks: int, world_size: int) -> None:
        if not self._shards.is_cached:
            return
        try:
            evaluation = load_manifest(self._data, EVALUATION)
        except ConfigError:  # a missing split is reported when the evaluation begins
            evaluation = None
        check_cache(self._data, self.manifest, evaluation, ranks=ranks, world_size=world_size)

    def names(self, position: int, count: int) -> list[str]:
        """Names of the samples at stream positions by the order, before bad samples are replaced."""
        sizes = [shard.num_samples for shard in self.manifest.shards]
        order = Order(sizes, seed=self._seed, window_shards=self._data.window_shards)  # the reader owns self._order
        names = [self._samples.name(int(number)) for number in order.samples(position, count)[1]]
        self._shards.rest()
        return names

    def account(self, count: int, step: int) -> None:
        """Records `count`, the ranks' sum of `bad.count` (stand-ins) up to the end of `step`."""
        self._bad_count, self._bad_step = count, step

    @property
    def too_many_bad(self) -> bool:
        """Whether the recorded stand-ins are over `data.max_bad_ratio`."""
        return too_many(
            self._bad_count,
            seen=self._seen,
            num_samples=self._order.num_samples,
            max_ratio=self._data.max_bad_ratio,
        )

    def refuse_bad(self, reasons: dict[str, str]) -> None:
        """Raises a `DataError` where `too_many_bad`; `reasons` are all ranks', by name of the sample."""
        refuse(
            reasons,
            count=self._bad_count,
            seen=self._seen,
            num_samples=self._order.num_samples,
            max_ratio=self._data.max_bad_ratio,
            earlier=self._bad_earlier,
        )

    @property
    def _seen(self) -> int:
        return (self._bad_step - self._bad_from_step) * self._data.global_batch

    def state_dict(self) -> dict[str, object]:
        """The position, the count of bad samples of all ranks, and the settings that the order depends on."""
        account = {"bad_count": self._bad_count, "bad_from_step": self._bad_from_step}
        return {"step": self._step, **account, **self._identity()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Resumes at a saved position with its count of bad samples.

        An old state without such a count starts it at zero, with a warning.

        Raises:
            ConfigError: the state is of another data set, seed, batch or window; the message names which.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ConfigError(
                    f"the checkpoint was made with {name}={state.get(name)!r}, this run has {value!r}; "
                    "go on with the old value, or start a new run with another --run_dir"
                )
        self._step = self._bad_step = _count(state, "step")
        if "bad_count" in state:
            self._bad_count, self._bad_from_step = _count(state, "bad_count"), _count(state, "bad_from_step")
        else:
            self._bad_count, self._bad_from_step = 0, self._step
            log.warning(
                "the checkpoint has no account of bad samples: data.max_bad_ratio holds from step %d", self._step
            )
        self._bad_earlier = self._bad_count
        self.bad.count = self._bad_count if self._rank == 0 else 0  # once in the sum over ranks

    def _identity(self) -> dict[str, object]:
        return {
            "data_identity": self.manifest.identity,
            "seed": self._seed,
            "global_batch": self._data.global_batch,
            "micro_batch": self._data.micro_batch,
            "window_shards": self._data.window_shards,
        }

    def close(self) -> None:
        """Ends the threads and closes the shards."""
        atexit.unregister(self.close)
        end(self._stream, self._shards, self._kind)


def _count(state: dict[str, object], name: str) -> int:
    value = state.get(name)
    if not isinstance(value, int) or value < 0:
        raise ConfigError(f"the checkpoint's loader state has {name}={value!r}, not a count; go on from another one")
    return value


def end(stream: Stream, shards: Shards, kind: Kind) -> None:
    shards.interrupt()
    stream.close()
    kind.close()
    shards.close()


def open_shards(data: DataConfig, split: str) -> Shards:
    """The set of a split, local or remote."""
    return Shards(
        join(data.path, split),
        cache_dir=data.cache_dir,
        cache_bytes=data.cache_bytes,
        retries=data.retries,
        timeout_s=data.timeout_s,
    )


def evaluation_batches(
    data: DataConfig,
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    split: str = EVALUATION,
    T: int | None = None,
) -> Generator[Batch, None, None]:
    """Every sample of a split exactly once over all ranks; each rank gets the same number of batches.

    Padding and bad samples are not `valid`: another sample of the split fills their place. `T` as in `Loader`.

    Raises:
        ConfigError, DataError: as `Loader`; also when this rank's bad samples alone are over `data.max_bad_ratio`.
    """
    shards, m = open_shards(data, split), data.micro_batch
    check_kind(data, shards.manifest)
    kind = kind_of(shards.manifest, data.plain, seed=0, device=device, T=T)
    samples, bad = Samples(shards), BadSamples()
    total = shards.manifest.num_samples
    per_rank = -(-total // (m * world_size))

    def request(index: int) -> Request:
        position = (rank * per_rank + index) * m
        places = position + np.arange(m)
        valid = places < total
        filled = np.minimum(places, total - 1)  # padding and stand-ins come from shards that are there already
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
            views=kind.whole_views(taken.records),
            labels=taken.records["label"].astype(np.int64),
            valid=valid,
            position=position,
            bad=reported,
        )

    stream = Stream(data, kind, device, samples, request, bad)
    close = partial(end, stream, shards, kind)
    atexit.register(close)  # for an evaluation that is left before its end
    try:
        yield from stream.run(range(per_rank))
        refuse(bad.reasons, count=bad.count, seen=total, num_samples=total, max_ratio=data.max_bad_ratio)
    finally:
        atexit.unregister(close)
        close()
