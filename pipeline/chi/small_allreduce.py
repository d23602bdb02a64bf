"""ZeRO-2 and 3, and fp16 at any stage: one small all-reduce when the optimizer steps.

In these modes gradients are reduced after every micro-batch and each rank keeps only its partition of the sum: no
bucket ever holds all of it. The carrier reads the partition in the pre-step hook of torch's optimizer, which DeepSpeed
calls with the fp32 gradient of the update, and sends one packed float64 vector:

    nnz, Σ|g|, Σg² and three counts of every layer     48 bytes a layer
    nnz, Σg² of the network, loss, other counts        56 bytes

All sums are additive, so a weight that lies across partitions is counted right. The all-reduce is asynchronous and
overlaps the update; integers are exact up to 2⁵³. If a gradient overflows, DeepSpeed makes no update and calls no hook:
the counts are then sent alone, after the step, and the totals say that the step was skipped.

The optimizer's gradient is unscaled and, with `optim.clip`, clipped. Clipping multiplies all gradients by one number:
nnz and participation do not change, and the norms are reported as before clipping.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import deepspeed.comm as dist
import torch
from torch import Tensor

from pipeline.chi.async_read import Constants
from pipeline.chi.comm_hook import MAX_RANKS_FP64, Share, TapError, Total, Watched, numel
from pipeline.chi.indicators import sums_of_each
from pipeline.errors import NonFiniteError


class Segment(NamedTuple):
    """Where a part of a parameter lies in one of the optimizer's flat tensors."""

    flat: Tensor
    row: int
    start: int
    length: int


class PartitionCarrier:
    """Counts this rank's partition of the gradient when the optimizer steps; `share` gives what else is sent."""

    max_ranks = MAX_RANKS_FP64

    def __init__(self, engine, watched: Watched, share: Callable[[], Share], *, self_check: bool, skips: bool) -> None:
        self._engine, self._watched, self._share, self._unchecked = engine, watched, share, self_check
        self._fp16 = engine.fp16_enabled()
        self._sums = watched.zeros()
        self._rows = Constants(watched.device)
        self._expected: Tensor | None = None
        self._vector: Tensor | None = None
        self._num_floats = 0
        self._skips = skips
        self._work = None
        self._scale = 1.0
        if self._fp16 and engine.zero_optimization_stage() > 0:
            engine.optimizer.loss_scaler.raise_error_at_min_scale = False  # `after_step` reports it, or may skip it
        self._segments: dict[int, list[Segment]] = {}
        for segment in _segments(engine, watched):
            self._segments.setdefault(id(segment.flat), []).append(segment)
        # Each group of parameters is updated by a step of its own.
        self._num_groups = self._groups_left = _num_groups(engine)
        engine.basic_optimizer.register_step_pre_hook(self._on_step)

    def before_step(self) -> None:
        """Keeps what is known only between backward and step: the loss scale, and counts of the first full gradient."""
        self._scale = float(self._engine.optimizer.loss_scale) if self._fp16 else 1.0
        self._groups_left = self._num_groups
        if self._unchecked:
            self._expected = self._watched.full_counts()

    def after_step(self) -> Total:
        """The step's totals; the next step starts from zero.

        Raises:
            NonFiniteError: the gradient was not finite, in a precision other than fp16; DeepSpeed made no update.
        """
        skipped, nonfinite = self._vector is None, ""
        if skipped:
            if self._groups_left != self._num_groups:
                raise TapError("the optimizer stepped some of its groups only; this version is not supported")
            if not self._fp16:
                nonfinite = "the gradient is not finite"
            elif self._scale <= 1:  # the scale of this step; DeepSpeed has lowered its own already
                nonfinite = "the gradient is not finite in fp16, not even with a loss scale of 1"
            if nonfinite and not self._skips:
                raise NonFiniteError(nonfinite)
            self._send(torch.full_like(self._sums, float("nan")))
        assert self._vector is not None
        if self._work is not None:
            self._work.wait()
        L = len(self._watched.layers)
        ends = (3 * L, 3 * L + 2, 3 * L + 2 + self._num_floats)
        sums, (nnz, squares), floats, counts = self._vector.tensor_split(ends)
        total = Total(
            sums=self._unclipped(sums.view(L, 3), squares),
            nnz=nnz,
            counts=counts.round().long(),
            floats=floats,
            skipped=skipped,
            nonfinite=nonfinite,
        )
        self._sums, self._vector, self._work = self._watched.zeros(), None, None
        return total

    def _on_step(self, optimizer, _args, _kwargs) -> None:
        # Only the group that is being updated holds its gradient.
        held = [flat for group in optimizer.param_groups for flat in group["params"] if flat.grad is not None]
        parts = [(s.row, flat.grad.reshape(-1)[s.start :][: s.length]) for flat in held for s in self._of(flat)]
        if parts:
            rows, gradients = zip(*parts, strict=True)
            # A parameter has one segment here, so the order of the additions does not matter.
            self._sums.index_add_(0, self._rows(rows), sums_of_each(gradients))
        self._groups_left -= 1
        if self._groups_left:
            return
        if self._replicated and dist.get_rank() != 0:
            self._sums.zero_()  # every rank holds the same gradient: count it once
        if self._expected is not None:
            seen = self._sums[:, 0].clone()
            dist.all_reduce(seen)
            self._watched.compare(seen, self._expected)
            self._expected, self._unchecked = None, False
        self._send(self._sums)

    def _of(self, flat: Tensor) -> Sequence[Segment]:
        return self._segments.get(id(flat), ())

    @property
    def _replicated(self) -> bool:
        return self._engine.zero_optimization_stage() == 0

    def _send(self, sums: Tensor) -> None:
        share = self._share()
        network = sums.sum(0)[::2]  # not [[0, 2]]: the host would wait for it
        parts = (sums[self._watched.layers].flatten(), network, share.floats.double(), share.counts.double())
        self._vector, self._num_floats = torch.cat(parts), share.floats.numel()
        if dist.get_world_size() > 1:
            self._work = dist.all_reduce(self._vector, async_op=True)

    def _unclipped(self, sums: Tensor, squares: Tensor) -> Tensor:
        """The layers' sums before clipping, from the network's norm before (DeepSpeed's) and after it (`squares`)."""
        if not self._engine.gradient_clipping():
            return sums
        norm = self._engine.get_global_grad_norm()
        # For fp16 without ZeRO, DeepSpeed gives the norm of the scaled gradient.
        norm = norm / self._scale if self._replicated else norm
        factor = torch.where(squares > 0, norm / squares.sqrt(), 1.0)
        return sums * torch.stack((torch.ones_like(factor), factor, factor.square()))


def _num_groups(engine) -> int:
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return 1
    return len(optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups)


def _segments(engine, watched: Watched) -> Iterator[Segment]:
    """This rank's part of every parameter, in the flat fp32 tensors that DeepSpeed hands to torch's optimizer."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    rows = {id(p): row for row, p in enumerate(watched.parameters)}
    if stage == 0:
        for half, full in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(half, full, strict=True):
                yield Segment(master, rows[id(parameter)], 0, master.numel())
    for row, parameter in enumerate(watched.parameters):
        if stage == 3:
            group, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            left = numel(parameter) - dist.get_rank() * length  # the last partitions are padded
            yield Segment(optimizer.fp32_partitioned_groups_flat[group], row, start, max(0, min(length, left)))
        elif stage > 0 and parameter._hp_mapping is not None:  # pyright: ignore[reportAttributeAccessIssue]
            mapping = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
            where = mapping.hp_fragment_address
            flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            yield Segment(flat, row, where.start, where.numel)
