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
from pipeline.snn.kernels.tally import Tally, meter


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


class _Spike(torch.autograd.Function):
    """`1[u >= 0]` in the forward pass, the surrogate in the backward pass."""

    @staticmethod
    def forward(ctx, u, width, amplitude, meter, rule: Rule):
        ctx.save_for_backward(u, width, amplitude)
        ctx.rule = rule
        return (u >= 0).to(u.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        u, width, amplitude = ctx.saved_tensors
        g = surrogate.derivative(u, width, amplitude, shape=ctx.rule.shape, scale=ctx.rule.scale)
        counts = _counts(u, width, g, ctx.rule) if ctx.needs_input_grad[3] else None
        return grad * g, None, None, counts, None


def _counts(u: torch.Tensor, width: torch.Tensor, g: torch.Tensor, rule: Rule) -> torch.Tensor:
    """One call's counts, in the order of `tally.COUNTED`."""
    inside = surrogate.covered(u, width) if rule.bounded else torch.zeros_like(u, dtype=torch.bool)
    terms = (torch.full((), u.numel(), device=u.device), (u >= 0).sum(), inside.sum(), (g * g).sum(dtype=torch.float64))
    return torch.stack([term.double() for term in terms])


def spike(u: torch.Tensor, width: torch.Tensor, amplitude: torch.Tensor, rule: Rule, tally: Tally | None):
    """`1[u >= 0]`, (...) in u's dtype, with the surrogate as derivative; the backward pass counts."""
    return _Spike.apply(u, width, amplitude, meter(tally, u), rule)


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
    return torch.stack(spikes).to(x.dtype), potential
