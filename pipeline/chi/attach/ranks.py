"""Sums over the ranks that train one model with a script's own loop: three ways, one interface.

    OneRank      nothing to sum
    DdpRanks     this rank's counts are a tail of DistributedDataParallel's last bucket: no collective is added
    GroupRanks   one small all-reduce of a group: FSDP2's shards, gradients that the script itself averages, and DDP
                 where its last bucket cannot carry the counts

All ranks get the same numbers.
"""

import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.chi.comm_hook import MAX_RANKS, MAX_RANKS_FP64, Limbs, Share
from pipeline.errors import ConfigError


class OneRank:
    """A model that is trained by one process."""

    count = 1
    sharded = False
    """Each rank has a part of every gradient, so their sums are summed too. Else every rank has all of it."""

    def total(self, sums: Tensor, share: Share) -> tuple[Tensor, Share]:
        """Over ranks, of one step: the gradient's sums `(L + 1, 3)` and what the layers counted."""
        return sums, share

    def agree(self, widths: Tensor) -> None:
        """Makes `widths` those of the first rank, in place."""

    def forget(self) -> None:
        """The gradients are thrown away."""


class GroupRanks(OneRank):
    """One all-reduce of float64 when the optimizer steps; integers are exact up to 2**53: 131,072 ranks.

    Args:
        group: the ranks; None: all.
        sharded: see `OneRank`.
    """

    def __init__(self, group: dist.ProcessGroup | None, *, sharded: bool) -> None:
        self._group, self.sharded, self.count = group, sharded, dist.get_world_size(group)
        if self.count > MAX_RANKS_FP64:
            raise ConfigError(f"chi.attach: {self.count} ranks; counts are exact up to {MAX_RANKS_FP64:,}, use fewer")

    def total(self, sums: Tensor, share: Share) -> tuple[Tensor, Share]:
        parts = ([sums.flatten()] if self.sharded else []) + [share.counts.double(), share.floats.double()]
        vector = torch.cat(parts)
        dist.all_reduce(vector, group=self._group)
        summed, counts, floats = vector.split([sums.numel() if self.sharded else 0, *map(len, parts[-2:])])
        return (
            summed.view_as(sums) if self.sharded else sums,
            Share(counts=counts.round().long(), floats=floats.float()),
        )

    def agree(self, widths: Tensor) -> None:
        dist.broadcast(widths, group=self._group, group_src=0)


class DdpRanks(GroupRanks):
    """The ranks of DDP's own process group; it averages the gradients, as DDP does without a hook.

    Where the script has registered a hook of its own, or the model is compiled (then a bucket may be reduced before all
    layers have counted), or the last bucket is of a half precision, the counts take the small all-reduce.

    Args:
        model: not yet trained by a backward pass.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        super().__init__(model.process_group, sharded=False)
        self.share: Callable[[], Share] | None = None
        """What this rank counted; None: nothing is measured."""
        self.may_be_early: Callable[[], bool] = lambda: False
        """Whether a bucket may be reduced before all layers have counted; the same on every rank."""
        self._model = weakref.ref(model)
        self._tail: Tensor | None = None
        self._was_reduced = False
        self._has_hook = not model._comm_hooks and self.count <= MAX_RANKS
        self._limbs = Limbs(min(self.count, MAX_RANKS))
        if self._has_hook:
            model.register_comm_hook(None, self._reduce)

    def total(self, sums: Tensor, share: Share) -> tuple[Tensor, Share]:
        if self._has_hook and not self._was_reduced:
            raise RuntimeError("chi.attach: the optimizer steps on a gradient that DDP has not reduced; leave one "
                               "backward pass before each step outside model.no_sync()")  # fmt: skip
        tail = self._tail
        self.forget()
        if tail is None:
            return super().total(sums, share)
        size = self._limbs.per_count * len(share.counts)
        return sums, Share(counts=self._limbs.unpack(tail[:size]), floats=tail[size:].float())

    def refuse_join(self) -> None:
        """Raises ConfigError within DDP's `join()`: a rank that ran out of batches steps no more, nor do its widths."""
        model = self._model()
        if model is not None and model._join_config.enable:
            raise ConfigError("chi.attach: DDP's join() lets ranks stop before others, and their widths with them; "
                              "give every rank the same number of batches (DistributedSampler does)")  # fmt: skip

    def forget(self) -> None:
        self._tail, self._was_reduced = None, False

    def _reduce(self, _, bucket) -> torch.futures.Future[Tensor]:
        # DDP itself multiplies by the inverse: dividing would round differently where the ranks are no power of 2.
        gradient = bucket.buffer().mul_(1.0 / self.count)
        if bucket.is_last():
            self._tail, self._was_reduced = None, True  # an earlier backward pass of this step sent less
        exact = gradient.dtype in (torch.float32, torch.float64)
        if not bucket.is_last() or self.share is None or not exact or self.may_be_early():
            return self._summed(gradient).then(lambda done: done.value()[0])
        share, size = self.share(), gradient.numel()
        tail = torch.cat((self._limbs.pack(share.counts), share.floats)).to(gradient)

        def split(done) -> Tensor:
            self._tail = done.value()[0][size:]
            return done.value()[0][:size]

        return self._summed(torch.cat((gradient, tail))).then(split)

    def _summed(self, tensor: Tensor) -> torch.futures.Future:
        work = dist.all_reduce(tensor, group=self._group, async_op=True)
        assert work is not None
        return work.get_future()
