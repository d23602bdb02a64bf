"""ZeRO-0 and 1: the counts for χ travel in the gradient all-reduce, so χ adds no collective.

DeepSpeed flattens all gradients into one fp32 bucket and reduces it once per optimizer step, in `allreduce_bucket` of
the engine (ZeRO-0) or of its optimizer (ZeRO-1). The carrier replaces that method on the instance:

    bucket  g_0 | g_1 | … | tail      the tail holds this rank's integers (neuron-steps, spikes, covered, flags) and
                                      the loss; ds_atgo and scale rms add 4 bytes a layer
       ↓ all-reduce                   the one that DeepSpeed does anyway; the tail adds 36 bytes a layer, and
                                      48 where there are more than 4,096 ranks
    reduced g_0 | g_1 | …  → sums_of_each in one pass, the same on every rank
    summed  tail           → counts over all ranks, exact

The gradient is seen before it is clipped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.chi.async_read import Constants
from pipeline.chi.indicators import sums_of_each
from pipeline.errors import NonFiniteError

COUNT_BITS = 36
"""Bits of one rank's count in a step."""
MAX_RANKS, MAX_RANKS_FP64 = 1 << 15, 1 << (53 - COUNT_BITS)
"""The most ranks whose counts are summed exactly, in any order: as `Limbs` in a bucket, and in float64."""


class Limbs:
    """Integers as floats of 24 bits, whose sum over ranks is exact in any order.

    An integer is cut into limbs of b bits, the last one without its upper end; b is 12, or less where `ranks` limbs
    would not fit into 24 bits: ranks (2**b - 1) < 2**24. Every partial sum is then an integer below 2**24, whether a
    ring adds the ranks or a tree. DeepSpeed averages in ZeRO-0: it multiplies the sum S by c = 1/ranks, rounded to
    fp32, and rounds the product. `unpack` divides by the same c in fp64. That gives S with an error below
    ranks 2**(b-25), which is at most 1/2 (where ranks are a power of 2, no error at all), so rounding gives S back.

    Args:
        ranks: 1 to MAX_RANKS. Up to 4,096 a count takes 3 limbs, above 4.

    The counts of a rank may be anything below 2**COUNT_BITS; or more, while their sum over ranks is below 2**47.
    """

    def __init__(self, ranks: int) -> None:
        self.bits = min(12, 24 - (ranks - 1).bit_length())
        self.per_count = -(-COUNT_BITS // self.bits)
        self._inverse = 1.0 / ranks

    def pack(self, counts: Tensor) -> Tensor:
        """`(n,)` int64 as `(per_count n,)` float32."""
        mask, last = (1 << self.bits) - 1, self.per_count - 1
        rows = [(counts >> (self.bits * limb)) & mask for limb in range(last)]
        return torch.cat([*rows, counts >> (self.bits * last)]).float()

    def unpack(self, summed: Tensor) -> Tensor:
        """The inverse of `pack`, of one rank's limbs or of their sum over ranks: `(n,)` int64."""
        rows = summed.double().round().long().view(self.per_count, -1)
        return sum((rows[limb] << (self.bits * limb) for limb in range(1, self.per_count)), start=rows[0])

    def summed(self, averaged: Tensor) -> Tensor:
        """Float64 sums over ranks from sums that were multiplied by 1/ranks in their own precision."""
        single = averaged.dtype == torch.float32
        return averaged.double() / (float(np.float32(self._inverse)) if single else self._inverse)


class TapError(RuntimeError):
    """The tap and DeepSpeed disagree about the reduced gradient: χ would be wrong, so the run ends before an update."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one rank saw during a step."""

    counts: Tensor
    """`(n,)` int64, each from 0 to below 2**36 (`Limbs` says when more is allowed)."""
    floats: Tensor
    """`(k,)` float32, other numbers to sum over ranks; k is the same in every step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Total:
    """What all ranks saw during a step, the same on each."""

    sums: Tensor
    """`(L, 3)` float64, `indicators.sums_of_each` of the layers' weights."""
    nnz: Tensor
    """0-d float64, non-zero gradients over all trainable parameters."""
    counts: Tensor
    """`(n,)` int64."""
    floats: Tensor
    """`(k,)` float64."""
    skipped: bool = False
    """No update was made: `sums` and `nnz` are NaN."""
    nonfinite: str = ""
    """What was not finite, for a message; empty where it was an overflow that fp16's loss scale adapts to."""


class Watched:
    """The trainable parameters of a network, P of them, and which are the weights of its L spiking layers."""

    def __init__(self, module: nn.Module, weights: Sequence[nn.Parameter | None]) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self.device = self.parameters[0].device
        self._rows = {id(p): row for row, p in enumerate(self.parameters)}
        self.layers = torch.tensor([0 if w is None else self._rows[id(w)] for w in weights], device=self.device)
        """`(L,)` rows of the layers' weights; row 0 for a layer without one."""
        self.has_weight = torch.tensor([w is not None for w in weights], device=self.device)
        """`(L,)` bool."""
        self.numel = torch.tensor([numel(p) for p in self.parameters], device=self.device)
        """`(P,)` elements of every parameter."""

    def rows(self, parameters: Sequence[nn.Parameter]) -> list[int]:
        """Row of each of these parameters among all P."""
        return [self._rows[id(p)] for p in parameters]

    def zeros(self) -> Tensor:
        """`(P, 3)` float64 for the sums of every parameter."""
        return torch.zeros(len(self.parameters), 3, dtype=torch.float64, device=self.device)

    def full_counts(self) -> Tensor:
        """`(P,)` float64, non-zero gradients by DeepSpeed's public API. One collective a parameter.

        For the check at the start only. Call it on every rank, between backward and step.
        """
        from deepspeed.utils import safe_get_full_grad  # not at the top: `chi.attach` runs without DeepSpeed

        counts = torch.zeros(len(self.parameters), dtype=torch.float64, device=self.device)
        for row, parameter in enumerate(self.parameters):
            full = safe_get_full_grad(parameter)
            if full is not None:
                counts[row] = torch.count_nonzero(full)
        return counts

    def compare(self, seen: Tensor, expected: Tensor) -> None:
        """Raises TapError where the counts `(P,)` differ; the error is the same on every rank."""
        different = (seen != expected).nonzero().flatten().tolist()
        if different:
            row = different[0]
            raise TapError(
                f"χ's self-check failed: {self.names[row]} has {expected[row].item():.0f} non-zero gradients by "
                f"DeepSpeed's full gradient and {seen[row].item():.0f} by the tap; use the DeepSpeed version of "
                "constraints.txt"
            )


def numel(parameter: nn.Parameter) -> int:
    """Elements of a whole parameter; ZeRO-3 leaves an empty tensor in its place."""
    return getattr(parameter, "ds_numel", parameter.numel())


class BucketCarrier:
    """Counts the gradient where DeepSpeed reduces it; `share` gives what this rank adds to the bucket."""

    max_ranks = MAX_RANKS

    def __init__(self, engine, watched: Watched, share: Callable[[], Share], *, self_check: bool, skips: bool) -> None:
        self._engine, self._watched, self._share, self._unchecked = engine, watched, share, self_check
        self._sums = watched.zeros()
        self._rows = Constants(watched.device)
        self._limbs = Limbs(engine.dp_world_size)
        self._tail: Tensor | None = None
        self._num_floats = 0
        self._skips, self._nonfinite = skips, ""
        self._zero1 = engine.zero_optimization_stage() == 1
        owner = engine.optimizer if self._zero1 else engine
        layout = self._zero1_layout if self._zero1 else self._zero0_layout
        owner.allreduce_bucket = self._counted(owner.allreduce_bucket, layout, averages=not self._zero1)

    def before_step(self) -> None:
        """Refuses a gradient that is not finite, and a first gradient whose count differs from DeepSpeed's.

        Only in ZeRO-0 the host waits for the answer: in ZeRO-1 DeepSpeed itself checks, and makes no update.
        """
        if self._tail is None:
            raise TapError("DeepSpeed reduced no gradient through allreduce_bucket; this version is not supported")
        if not self._zero1 and (reason := self._not_finite()):
            self._refuse(reason)
            self._leave_out_update()
        if self._unchecked:
            self._watched.compare(self._sums[:, 0], self._watched.full_counts())
            self._unchecked = False

    def after_step(self) -> Total:
        """The step's totals; the next step starts from zero.

        Raises:
            NonFiniteError: DeepSpeed (ZeRO-1) made no update because the gradient was not finite.
        """
        assert self._tail is not None
        if self._zero1 and self._engine.optimizer.overflow:
            self._refuse(self._not_finite() or "the norm of the gradient is not finite")
        if self._nonfinite:
            self._sums.fill_(float("nan"))
        total = Total(
            sums=self._sums[self._watched.layers],
            nnz=self._sums[:, 0].sum(),
            skipped=bool(self._nonfinite),
            nonfinite=self._nonfinite,
            counts=self._limbs.unpack(self._tail[: -self._num_floats]),
            floats=self._tail[-self._num_floats :],
        )
        self._sums, self._tail, self._nonfinite = self._watched.zeros(), None, ""
        return total

    def _not_finite(self) -> str:
        """Which gradients are not finite, for a message; empty where all are. The host waits for it."""
        finite = torch.isfinite(self._sums).all(1)
        if finite.all():
            return ""
        names = [name for name, ok in zip(self._watched.names, finite.tolist(), strict=True) if not ok]
        return f"the gradient of {names[0]} and of {len(names) - 1} more parameters is not finite"

    def _refuse(self, reason: str) -> None:
        if not self._skips:
            raise NonFiniteError(reason)
        self._nonfinite = reason

    def _leave_out_update(self) -> None:
        """ZeRO-0: the engine's next step counts and clears the gradient, but changes no parameter."""
        optimizer = self._engine.optimizer
        update = optimizer.step

        def left_out(*_args, **_kwargs) -> None:
            optimizer.step = update

        optimizer.step = left_out

    def _counted(self, reduce: Callable[..., Tensor], layout: Callable, averages: bool) -> Callable[..., Tensor]:
        def allreduce_bucket(bucket: list[Tensor], *args, **kwargs) -> Tensor:
            if bucket[0].dtype not in (torch.float32, torch.float64) or kwargs.get("rank") is not None:
                raise TapError(f"a {bucket[0].dtype} bucket was reduced; χ needs one of all gradients, in fp32 or fp64")
            owned = layout(bucket)
            if self._tail is not None:
                reduced = reduce(bucket, *args, **kwargs)
            else:
                share = self._share()
                tail = torch.cat((self._limbs.pack(share.counts), share.floats)).to(bucket[0].dtype)
                self._num_floats = share.floats.numel()
                flat = reduce([*bucket, tail], *args, **kwargs)
                reduced = flat[: -tail.numel()]
                tail = flat[-tail.numel() :]
                # A copy: DeepSpeed owns the flat bucket, and frees or reuses it after the step.
                self._tail = self._limbs.summed(tail) if averages else tail.to(torch.float64, copy=True)
            parts = reduced.split([p.numel() for p in owned])
            self._sums[self._rows(self._watched.rows(owned))] = sums_of_each(parts)
            return reduced

        return allreduce_bucket

    def _zero0_layout(self, bucket: list[Tensor]) -> list[nn.Parameter]:
        by_address = {p.grad.data_ptr(): p for p in self._watched.parameters if p.grad is not None and p.numel() > 0}
        return [by_address[gradient.data_ptr()] for gradient in bucket]

    def _zero1_layout(self, bucket: list[Tensor]) -> list[nn.Parameter]:
        # The bucket is cut by destination rank, but its elements keep the order of the parameters that filled it.
        optimizer = self._engine.optimizer
        return [optimizer.bit16_groups[g][i] for g, i, _ in optimizer.ipg_buckets[bucket[0].dtype].params]
