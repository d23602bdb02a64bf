"""The definition of a spiking layer. Every faster form is tested against it.

For t = 1 .. T, from v[0] = v_reset or a given state:

    h[t] = v[t-1] + x[t]                                     IF
    h[t] = v[t-1] + (x[t] - (v[t-1] - v_reset)) * leak       LIF and PLIF, leak = 1/tau
    s[t] = 1[h[t] >= v_th]
    v[t] = h[t] (1 - s[t]) + v_reset s[t]                    hard reset
    v[t] = h[t] - v_th s[t]                                  soft reset

In the backward pass ds/dh is the surrogate `g(h - v_th)`; with a detached reset, s is a constant in v[t].
The potential is fp32 for any dtype of x (fp64 for fp64); spikes have the dtype of x.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline.snn import surrogate


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """The kind of a neuron: everything that training does not change."""

    leaky: bool = False
    """True for LIF and PLIF, False for IF."""
    hard: bool = True
    """True: a spike sets the potential to v_reset. False: it subtracts v_th."""
    detach: bool = True
    """No gradient flows through s in the reset."""
    v_th: float = 1.0
    v_reset: float = 0.0
    shape: str = "triangle"
    """Shape of the surrogate, see surrogate.py."""
    scale: str = "area"
    """Normalisation of the surrogate, see surrogate.py."""

    @property
    def bounded(self) -> bool:
        """Whether the surrogate has compact support, so that coverage is defined."""
        return self.shape in surrogate.BOUNDED


@dataclass(frozen=True, slots=True, eq=False)
class Tally:
    """One layer's counters in device memory: 0-d views, added to in place."""

    spikes: torch.Tensor
    """Number of spikes; int64, added to by the forward pass."""
    covered: torch.Tensor
    """Neuron-steps with |h - v_th| < w; int64, added to by the backward pass, bounded shapes only."""
    grad_sq: torch.Tensor
    """Sum of g(h - v_th)^2; fp64, added to by the backward pass."""


class _Spike(torch.autograd.Function):
    """`1[u >= 0]` in the forward pass, the surrogate in the backward pass."""

    @staticmethod
    def forward(ctx, u, width, amplitude, rule: Rule, tally: Tally | None):
        ctx.save_for_backward(u, width, amplitude)
        ctx.rule, ctx.tally = rule, tally
        return (u >= 0).to(u.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        u, width, amplitude = ctx.saved_tensors
        g = surrogate.derivative(u, width, amplitude, shape=ctx.rule.shape, scale=ctx.rule.scale)
        if ctx.tally is not None:
            ctx.tally.grad_sq.add_((g * g).sum(dtype=ctx.tally.grad_sq.dtype))
            if ctx.rule.bounded:
                ctx.tally.covered.add_(surrogate.covered(u, width).sum())
        return grad * g, None, None, None, None


def spike(u: torch.Tensor, width: torch.Tensor, amplitude: torch.Tensor, rule: Rule, tally: Tally | None):
    """`1[u >= 0]`, (...) in u's dtype, with the surrogate as derivative; the backward pass counts coverage and Σg²."""
    return _Spike.apply(u, width, amplitude, rule, tally)


def potential_dtype(x: torch.Tensor) -> torch.dtype:
    """dtype of the potential: fp64 for fp64 input, fp32 for every other."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def run(
    x: torch.Tensor,
    rule: Rule,
    width: torch.Tensor,
    amplitude: torch.Tensor,
    *,
    leak: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    tally: Tally | None = None,
    see: Callable[[torch.Tensor], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """T steps of one layer of neurons.

    Args:
        x: input current, (T, ...), any floating dtype.
        rule: the kind of neuron.
        width: w of the surrogate, 0-d.
        amplitude: a of the surrogate, 0-d.
        leak: 1/tau, 0-d; for leaky rules only. PLIF's gradient flows to it.
        v: potential before the first step, (...); None: v_reset.
        tally: the layer's counters; None: nothing is counted.
        see: called with h - v_th (...) of every step.

    Returns:
        Spikes (T, ...) in the dtype of x, and the potential after the last step (...) in fp32 (fp64 for fp64).
    """
    dtype = potential_dtype(x)
    current = x.to(dtype)
    width, amplitude = width.to(dtype), amplitude.to(dtype)
    potential = torch.full_like(current[0], rule.v_reset) if v is None else v.to(dtype)
    spikes = []
    for x_t in current:
        if rule.leaky:
            assert leak is not None
            h = potential + (x_t - (potential - rule.v_reset)) * leak.to(dtype)
        else:
            h = potential + x_t
        if see is not None:
            see(h - rule.v_th)
        s = spike(h - rule.v_th, width, amplitude, rule, tally)
        s_reset = s.detach() if rule.detach else s
        potential = h * (1 - s_reset) + rule.v_reset * s_reset if rule.hard else h - rule.v_th * s_reset
        spikes.append(s)
    s_all = torch.stack(spikes)
    if tally is not None:
        tally.spikes.add_(s_all.detach().sum(dtype=torch.float64).long())
    return s_all.to(x.dtype), potential
