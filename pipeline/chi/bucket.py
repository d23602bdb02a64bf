"""ZeRO-0 and 1: χ rides the gradient all-reduce and costs no collective of its own.

DeepSpeed flattens all gradients into one fp32 bucket and reduces it once per optimizer step, in `allreduce_bucket` of
the engine (ZeRO-0) or of its optimizer (ZeRO-1). The carrier replaces that method on the instance:

    bucket  g_0 | g_1 | … | tail      the tail holds this rank's integers: spikes, covered neuron-steps, flags; and
                                      the loss, with ds_atgo and scale rms 4 bytes a layer more
       ↓ all-reduce                   the one that DeepSpeed does anyway; the tail adds 24 bytes a layer
    reduced g_0 | g_1 | …  → gradient_sums, the same on every rank
    summed  tail           → counts over all ranks, exact

The gradient is seen before it is clipped.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.chi.carrier import Share, TapError, Total, Watched
from pipeline.chi.host import Constants
from pipeline.chi.indicator import gradient_sums
from pipeline.chi.limbs import pack, unpack
from pipeline.errors import NonFiniteError


class BucketCarrier:
    """Counts the gradient where DeepSpeed reduces it; `share` gives what this rank adds to the bucket."""

    def __init__(self, engine, watched: Watched, share: Callable[[], Share], *, self_check: bool, skips: bool) -> None:
        self._engine, self._watched, self._share, self._unchecked = engine, watched, share, self_check
        self._sums = watched.zeros()
        self._rows = Constants(watched.device)
        self._tail: Tensor | None = None
        self._num_floats = 0
        self._skips, self._nonfinite = skips, ""
        self._zero1 = engine.zero_optimization_stage() == 1
        owner = engine.optimizer if self._zero1 else engine
        layout = self._zero1_layout if self._zero1 else self._zero0_layout
        owner.allreduce_bucket = self._counted(owner.allreduce_bucket, layout, averages=not self._zero1)

    def before_step(self) -> None:
        """Refuses a gradient that is not finite, and a first one that DeepSpeed counts otherwise.

        The host waits for the answer in ZeRO-0 alone: in ZeRO-1 DeepSpeed itself looks, and makes no update.
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
            NonFiniteError: DeepSpeed (ZeRO-1) made no update, since the gradient was not finite.
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
            counts=unpack(self._tail[: -self._num_floats]),
            floats=self._tail[-self._num_floats :].double(),
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
                tail = torch.cat((pack(share.counts), share.floats)).to(bucket[0].dtype)
                self._num_floats = share.floats.numel()
                flat = reduce([*bucket, tail], *args, **kwargs)
                reduced = flat[: -tail.numel()]
                # A copy: the flat bucket is DeepSpeed's, and is freed or reused after the step.
                self._tail = flat[-tail.numel() :].clone().mul_(self._engine.dp_world_size if averages else 1)
            parts = reduced.split([p.numel() for p in owned])
            self._sums[self._rows(self._watched.rows(owned))] = torch.stack([gradient_sums(part) for part in parts])
            return reduced

        return allreduce_bucket

    def _zero0_layout(self, bucket: list[Tensor]) -> list[nn.Parameter]:
        by_address = {p.grad.data_ptr(): p for p in self._watched.parameters if p.grad is not None and p.numel() > 0}
        return [by_address[gradient.data_ptr()] for gradient in bucket]

    def _zero1_layout(self, bucket: list[Tensor]) -> list[nn.Parameter]:
        # The bucket arrives cut by destination rank; its elements lie as the whole parameters did when it was filled.
        optimizer = self._engine.optimizer
        return [optimizer.bit16_groups[g][i] for g, i, _ in optimizer.ipg_buckets[bucket[0].dtype].params]
