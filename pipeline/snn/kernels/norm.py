"""Batch normalisation, T steps of neurons and the shortcut's addition as one op that keeps only its input.

    mean, var over (T N, H, W)     of y in fp32, or the running statistics in evaluation
    x = y scale + shift            scale = gamma / sqrt(var + eps), shift = beta - mean scale
    out = spikes(x) [+ shortcut]

Between BN and neurons the current x is fp32 even where y is bf16. `run_reference` is the definition. The twins keep y
alone, as BN would, and recompute x and h in the backward pass. Where y can be recomputed (packing.py) they do not keep
it either. They keep the statistics of each channel, so that these are not counted
twice.

With `Ranks` the mean and variance are over the y of all ranks. This costs one sum over ranks, of two numbers a channel,
in the forward pass, and one in the backward pass, as a gradient then flows to every rank's y.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from pipeline.snn.kernels import dispatch, packing, reference
from pipeline.snn.kernels.chunked import Chunks, in_chunks
from pipeline.snn.kernels.dispatch import Call
from pipeline.snn.kernels.packing import Again
from pipeline.snn.kernels.reference import Rule
from pipeline.snn.kernels.tally import Tally, meter


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The ranks that normalise their batches as one batch; all these batches have the same size."""

    count: int
    sum: Callable[[torch.Tensor], torch.Tensor]
    """A collective: the sum of a tensor over these ranks, returned on each. It may overwrite its argument."""

    def joint(self, mean: torch.Tensor, var: torch.Tensor, sum_: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and biased variance of all batches, (C,) in doubles, from those of this batch; `sum_` is over ranks."""
        mean, var = mean.double(), var.double()
        mean, square = sum_(torch.stack((mean, var + mean * mean))) / self.count
        return mean, (square - mean * mean).clamp_min(0)


class _Sum(torch.autograd.Function):
    """Sums values over ranks in the forward pass, and gradients over ranks in the backward pass."""

    @staticmethod
    def forward(ctx, x, ranks: Ranks):
        ctx.ranks = ranks
        return ranks.sum(x.clone())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return ctx.ranks.sum(grad.clone()), None


def run_reference(
    y: torch.Tensor,
    bn: nn.BatchNorm2d,
    rule: Rule,
    width: torch.Tensor,
    amplitude: torch.Tensor,
    *,
    num_steps: int,
    static: bool = False,
    leak: torch.Tensor | None = None,
    shortcut: torch.Tensor | None = None,
    tally: Tally | None = None,
    ranks: Ranks | None = None,
) -> torch.Tensor:
    """The definition, in plain torch.

    Args:
        y: a convolution's output, (T N, C, H, W), any floating dtype; (N, C, H, W) where static.
        bn: its batch normalisation; in training mode its running statistics are updated.
        rule, width, amplitude, leak, tally: as in `reference.run`.
        num_steps: T.
        static: y holds one step and is the same at every step.
        shortcut: added to the spikes, (T N, C, H, W).
        ranks: in training mode, the ranks whose y is normalised together with this one.

    Returns:
        (T N, C, H, W) in y's dtype.
    """
    with torch.autocast(y.device.type, enabled=False):
        y_ = y.to(reference.potential_dtype(y))
        x = _normalised(y_, bn) if ranks is None or not bn.training else _jointly_normalised(y_, bn, ranks)
        steps = x[None].expand(num_steps, *x.shape) if static else x.unflatten(0, (num_steps, -1))
        spikes, _ = reference.run(steps, rule, width, amplitude, leak=leak, tally=tally)
        out = spikes.flatten(0, 1).to(y.dtype)
        return out if shortcut is None else out + shortcut


def _normalised(y: torch.Tensor, bn: nn.BatchNorm2d) -> torch.Tensor:
    """`bn(y)` in y's dtype, also where DeepSpeed has made the parameters fp16 while the statistics are fp32."""
    if bn.weight is None or bn.weight.dtype == y.dtype:
        return bn(y)
    assert bn.momentum is not None
    if bn.training and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    weight, bias = bn.weight.to(y.dtype), bn.bias.to(y.dtype)
    return functional.batch_norm(y, bn.running_mean, bn.running_var, weight, bias, bn.training, bn.momentum, bn.eps)


def _jointly_normalised(y: torch.Tensor, bn: nn.BatchNorm2d, ranks: Ranks) -> torch.Tensor:
    """`bn(y)` in training mode, with the statistics of all ranks' y."""
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    mean, var = ranks.joint(mean, var, lambda moments: _Sum.apply(moments, ranks))
    _count_in(bn, mean.detach(), var.detach(), y.numel() // y.shape[1] * ranks.count)
    scale = bn.weight * (var + bn.eps).rsqrt()
    scale, shift = (part.to(y.dtype)[:, None, None] for part in (scale, bn.bias - mean * scale))
    return y * scale + shift


class _Fused(torch.autograd.Function):
    """The twins, over rows (T N, H, W, C) of channels-last tensors.

    With gx the gradient for x, BN's gradient is `scale (gx - mean(gx) - (y - mean) rstd^2 mean(gx (y - mean)))`, with
    means over n = T N H W. The neurons' backward pass gives both sums, and one more pass applies them.
    """

    @staticmethod
    def forward(ctx, y, gamma, beta, shortcut, leak, width, amplitude, meter, bn, call: Call | Chunks, again, ranks):
        mean, rstd, scale, shift = _prepared(y, bn, gamma, beta, call, ranks)
        n, c, h, w = y.shape
        rows = _rows(y, call)
        added = None if shortcut is None else shortcut.permute(0, 2, 3, 1)
        out, _ = call.forward(rows, scale, shift, added, None, False)
        kept = rows if again is None else again.source
        ctx.save_for_backward(kept, mean, rstd, scale, shift, leak, width, amplitude)
        ctx.call, ctx.train, ctx.shape, ctx.add = call, bn.training, (n, h, w, c), shortcut is not None
        ctx.make = None if again is None else again.make
        ctx.ranks = ranks
        return out.view(-1, h, w, c).permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        rows, mean, rstd, scale, shift, *_ = ctx.saved_tensors
        n, h, w, c = ctx.shape
        if ctx.make is not None:
            rows = _rows(ctx.make(rows).contiguous(memory_format=torch.channels_last), ctx.call)
        grad_out = grad_out.contiguous(memory_format=torch.channels_last)
        grads = grad_out.permute(0, 2, 3, 1)
        counted = ctx.needs_input_grad[7]
        grad, _, grad_leak, sums, counts = ctx.call.backward(grads, None, rows, scale, shift, mean, None, counted)
        count, joint = n * h * w, sums
        if ctx.train and ctx.ranks is not None:
            joint = ctx.ranks.sum(sums.to(torch.float64, copy=True))  # it may overwrite its argument
            count *= ctx.ranks.count
        kernels = dispatch.gpu_kernels(rows)
        find = gradients if kernels is None else kernels.norm_gradients
        grad_gamma, grad_shift, b, d = find(sums, joint, mean, rstd, scale, count)
        if not ctx.train:
            b, d = torch.zeros_like(b), torch.zeros_like(d)
        ctx.call.affine(rows, grad, scale, b, d)
        grad_y = grad.view(n, h, w, c).permute(0, 3, 1, 2)
        shortcut = grad_out if ctx.add else None
        return grad_y, grad_gamma, grad_shift, shortcut, grad_leak, None, None, counts, *[None] * 4


def _rows(y: torch.Tensor, call: Call | Chunks) -> torch.Tensor:
    """(T N, C, H, W) in channels-last as (T, N H W C), a view; one row where static."""
    return y.permute(0, 2, 3, 1).view(1 if call.static else call.num_steps, -1)


def gradients(
    sums: torch.Tensor, joint: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, scale: torch.Tensor, count: int
) -> tuple[torch.Tensor, ...]:
    """What the backward pass makes of its two sums by channel.

    Args:
        sums: of gx and of gx (y - mean) over this rank's loss, (2, C) fp64.
        joint: the same over all ranks that normalise together.
        mean, rstd, scale: of the forward pass, (C,) fp32.
        count: values of a channel in all these batches.

    Returns:
        (C,) fp32 each: the gradients of gamma and beta, of this rank's loss alone, as for any parameter; b and d of the
        step `gy = scale gx + b y + d` in training. They are found in doubles: where a mean is large, the terms of d
        nearly cancel.
    """
    b = -scale.double() * rstd.double().square() * joint[1] / count
    d = -scale.double() * joint[0] / count - b * mean.double()
    return tuple(part.float() for part in (sums[1] * rstd, sums[0], b, d))


def _prepared(
    y: torch.Tensor,
    bn: nn.BatchNorm2d,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    call: Call | Chunks,
    ranks: Ranks | None,
) -> tuple[torch.Tensor, ...]:
    """Mean, 1/sqrt(var + eps), scale and shift, (C,) fp32; in training the running statistics are updated."""
    kernels = dispatch.gpu_kernels(y)
    if kernels is not None and bn.training and ranks is None:
        return kernels.normalise(y, bn, gamma, beta, _num_values(y))
    mean, var = _statistics(y, bn, call, ranks)
    rstd = (var + bn.eps).rsqrt()
    scale = gamma * rstd
    return mean, rstd, scale, beta - mean * scale


def _statistics(
    y: torch.Tensor, bn: nn.BatchNorm2d, call: Call | Chunks | type[Call], ranks: Ranks | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance to normalise with, (C,) fp32; in training mode the running statistics are updated."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    if not bn.training:
        return bn.running_mean.float(), bn.running_var.float()
    count = _num_values(y) if ranks is None else _num_values(y, ranks.count)
    mean, var = call.statistics(y)
    if ranks is not None:
        mean, var = (moment.float() for moment in ranks.joint(mean, var, ranks.sum))
    _count_in(bn, mean, var, count)
    return mean, var


def _num_values(y: torch.Tensor, num_ranks: int = 1) -> int:
    """Values of a channel in the batches of all ranks; their variance needs two."""
    count = y.numel() // y.shape[1] * num_ranks
    if count == 1:
        raise ValueError(
            f"batch normalisation needs more than 1 value per channel when training, got input size {tuple(y.shape)}; "
            "use a larger batch or image"
        )
    return count


def _count_in(bn: nn.BatchNorm2d, mean: torch.Tensor, var: torch.Tensor, count: int) -> None:
    """Moves the running statistics towards those of a batch of `count` values a channel."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    assert bn.num_batches_tracked is not None
    assert bn.momentum is not None
    bn.num_batches_tracked.add_(1)
    bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), bn.momentum)
    bn.running_var.lerp_((var * (count / (count - 1))).to(bn.running_var.dtype), bn.momentum)


def run(
    y: torch.Tensor,
    bn: nn.BatchNorm2d,
    rule: Rule,
    width: torch.Tensor,
    amplitude: torch.Tensor,
    *,
    num_steps: int,
    static: bool = False,
    leak: torch.Tensor | None = None,
    shortcut: torch.Tensor | None = None,
    tally: Tally | None = None,
    again: Again | None = None,
    ranks: Ranks | None = None,
) -> torch.Tensor:
    """As `run_reference`, in the fastest form that works here.

    With `again`, the twins keep its source for the backward pass instead of y. The reference keeps y: its gradient is
    autograd's.

    Raises:
        ValueError: the rows of y or the shortcut do not fit `num_steps`; training on a single value.
    """
    if not static and y.shape[0] % num_steps:
        raise ValueError(f"y of shape {tuple(y.shape)} does not hold num_steps={num_steps} steps; use (T N, C, H, W)")
    wanted = (y.shape[0] * (num_steps if static else 1), *y.shape[1:])
    if shortcut is not None and shortcut.shape != wanted:
        raise ValueError(f"shortcut of shape {tuple(shortcut.shape)} is not allowed; use {wanted}")
    arguments = {"num_steps": num_steps, "static": static, "leak": leak, "shortcut": shortcut, "tally": tally}
    arguments["ranks"] = ranks
    call_type = dispatch.choose(y, rule) if _plain(bn) else None
    if call_type is not None:
        call = call_type(
            rule=rule,
            num_steps=num_steps,
            num_channels=y.shape[1],
            static=static and num_steps > 1,
            width=width,
            amplitude=amplitude,
            leak=leak,
        )
        y = y.contiguous(memory_format=torch.channels_last)
        if shortcut is not None:
            shortcut = shortcut.to(y.dtype).contiguous(memory_format=torch.channels_last)
        gamma, beta = bn.weight.float(), bn.bias.float()
        counts = meter(tally, y, gamma, beta, leak)
        return _Fused.apply(y, gamma, beta, shortcut, leak, width, amplitude, counts, bn, in_chunks(call), again, ranks)
    return run_reference(y, bn, rule, width, amplitude, **arguments)


def batch_norm(
    y: torch.Tensor, bn: nn.BatchNorm2d, *, again: Again | None = None, ranks: Ranks | None = None
) -> torch.Tensor:
    """`bn(y)` where a sum, and not neurons, follows: y's dtype, and as `run` in all else.

    With `again` its source is kept for the backward pass instead of y, but not with `ranks`.
    """
    dtype = reference.potential_dtype(y)
    if bn.training and ranks is not None:
        with torch.autocast(y.device.type, enabled=False):
            return _jointly_normalised(y.to(dtype), bn, ranks).to(y.dtype)
    if bn.training:
        assert bn.num_batches_tracked is not None
        bn.num_batches_tracked.add_(1)
    assert bn.momentum is not None
    statistics = bn.running_mean, bn.running_var, bn.weight.to(dtype), bn.bias.to(dtype)
    with contextlib.nullcontext() if again is None else packing.kept_as(y, again):
        # Autocast leaves it alone: y's dtype comes out, and the statistics are found in fp32.
        return functional.batch_norm(y, *statistics, bn.training, bn.momentum, bn.eps)


def _plain(bn: nn.BatchNorm2d) -> bool:
    """Whether the twins cover this BN: affine in fp32 or fp16, with running statistics and a fixed momentum."""
    fixed = bn.affine and bn.track_running_stats and bn.momentum is not None
    return type(bn) is nn.BatchNorm2d and fixed and bn.weight.dtype in (torch.float32, torch.float16)
