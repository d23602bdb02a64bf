"""The CPU twin: `torch.compile` of one layer's T steps, forward and backward, over a flat (T, M) view.

It saves x and not h: h is recomputed in the backward pass, in registers. So one bf16 neuron-step moves 4 bytes forward
(x, s) and 6 backward (x, grad s, grad x), and retains nothing but x. The backward pass is derived by hand from the
definition in reference.py. With g = g(h - v_th) and `grad v[T]` from the state where it was asked for, for t = T .. 1:

    dv/dh   = 1 - s [+ (v_reset - h) g]  hard;  1 [- v_th g]  soft;  [...] where the reset is not detached
    grad h[t]   = grad s[t] g + grad v[t] dv/dh
    grad x[t]   = grad h[t]               IF;   grad h[t] leak         leaky
    grad v[t-1] = grad h[t]               IF;   grad h[t] (1 - leak)   leaky
    grad leak   = sum_t grad h[t] (x[t] - (v[t-1] - v_reset))

Element by element the operations and their order are the reference's, without contraction to fused multiply-adds, so
spikes and potentials are the same bits.
"""

import functools
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline.snn import surrogate
from pipeline.snn.kernels.reference import Rule, Tally, potential_dtype

log = logging.getLogger(__name__)

MAX_STEPS = 32
"""Longest T that is compiled: the loop over time is unrolled, and compile time grows with it."""
MAX_NEURON_STEPS = 2**31 - 1
"""Counts are summed in int32 within one call."""
_WARM_UP = 1 << 16
"""Neurons of the warm-up call: large enough that the compiler decides for threads."""


@dataclass(frozen=True, slots=True)
class Twins:
    """The two compiled passes of one rule."""

    forward: Callable
    backward: Callable


def _step(x_t, v, leak, rule: Rule):
    """One step: the potential before the reset, what follows it, and the spike."""
    h = v + x_t if leak is None else v + (x_t - (v - rule.v_reset)) * leak
    s = (h - rule.v_th >= 0).to(h.dtype)
    v = h * (1 - s) + rule.v_reset * s if rule.hard else h - rule.v_th * s
    return h, s, v


def _forward(x, v, leak, outs, rule: Rule, num_steps: int, want_state: bool):
    # Spikes are written into views of one tensor: `torch.stack` would cost a second pass.
    dtype = potential_dtype(x)
    leak = None if leak is None else leak.to(dtype)
    current = x.to(dtype)
    v = torch.full_like(current[0], rule.v_reset) if v is None else v.to(dtype)
    count = torch.zeros_like(current[0])
    for t in range(num_steps):
        _, s, v = _step(current[t if x.shape[0] > 1 else 0], v, leak, rule)
        count = count + s
        outs[t].copy_(s)
    return count.sum(dtype=torch.int32), (v if want_state else None)


def _backward(grad_s, grad_v, x, v, leak, width, amplitude, outs, rule: Rule, num_steps: int):
    dtype = potential_dtype(x)
    leak = None if leak is None else leak.to(dtype)
    width, amplitude = width.to(dtype), amplitude.to(dtype)
    current = x.to(dtype)
    at = [t if x.shape[0] > 1 else 0 for t in range(num_steps)]
    v = torch.full_like(current[0], rule.v_reset) if v is None else v.to(dtype)
    befores, potentials, spikes = [], [], []
    for t in range(num_steps):
        befores.append(v)
        h, s, v = _step(current[at[t]], v, leak, rule)
        potentials.append(h)
        spikes.append(s)
    zero = torch.zeros_like(v)
    grad_v = zero if grad_v is None else grad_v.to(dtype)
    covered, grad_sq, grad_leak, grad_static = zero, zero, zero, zero
    for t in reversed(range(num_steps)):
        h, s = potentials[t], spikes[t]
        u = h - rule.v_th
        g = surrogate.derivative(u, width, amplitude, shape=rule.shape, scale=rule.scale)
        if rule.hard:
            keep = 1 - s if rule.detach else 1 - s + (rule.v_reset - h) * g
        else:
            keep = 1.0 if rule.detach else 1 - rule.v_th * g
        grad_h = grad_s[t].to(dtype) * g + grad_v * keep
        grad_sq = grad_sq + g * g
        if rule.bounded:
            covered = covered + surrogate.covered(u, width).to(dtype)
        if leak is None:
            grad_x, grad_v = grad_h, grad_h
        else:
            grad_x, grad_v = grad_h * leak, grad_h * (1 - leak)
            grad_leak = grad_leak + grad_h * (current[at[t]] - (befores[t] - rule.v_reset))
        if x.shape[0] > 1 or num_steps == 1:
            outs[t].copy_(grad_x)
        else:
            grad_static = grad_static + grad_x
    if x.shape[0] == 1 and num_steps > 1:
        outs[0].copy_(grad_static)
    return (
        covered.sum(dtype=torch.int32) if rule.bounded else None,
        grad_sq.sum(),
        None if leak is None else grad_leak.sum(),
        grad_v,
    )


def _entry(function: Callable, *arguments: object) -> Callable:
    """`function` with its last arguments fixed, compiled, with a code object of its own.

    Dynamo caps the number of recompiles per code object; rules must not use up each other's.
    """

    def entry(*tensors):
        return function(*tensors, *arguments)

    entry.__code__ = entry.__code__.replace(co_name=f"spiking_layer{function.__name__}_{next(_serial)}")
    return torch.compile(entry, dynamic=True)


_serial = itertools.count()


@functools.cache
def _compiled(rule: Rule, num_steps: int, dtype: torch.dtype, static: bool, stateful: bool) -> Twins | None:
    """Both passes, compiled and run once; None where that does not work, which is said once."""
    forward = _entry(_forward, rule, num_steps, stateful)
    backward = _entry(_backward, rule, num_steps)
    twins = Twins(forward, backward)
    x = torch.zeros((1 if static else num_steps, _WARM_UP), dtype=dtype)
    spikes = torch.zeros((num_steps, _WARM_UP), dtype=dtype)
    v = torch.zeros(_WARM_UP, dtype=potential_dtype(x)) if stateful else None
    leak = torch.tensor(0.5) if rule.leaky else None
    one = torch.ones(())
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            forward(x, v, leak, list(spikes))
            backward(spikes, v, x, v, leak, one, one, list(torch.empty_like(x)))
    except (RuntimeError, OSError, ImportError) as error:
        _unavailable(error)
        return None
    return twins


_told: list[str] = []


def _unavailable(error: Exception) -> None:
    if not _told:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        _told.append(reason)
        log.warning(
            "torch.compile does not work here, so spiking layers run the slower reference on the CPU: %s: %s",
            type(error).__name__,
            reason,
        )


def why_not() -> str:
    """Why torch.compile did not work; empty where it did, or was not tried yet."""
    return _told[0] if _told else ""


def twins(rule: Rule, x: torch.Tensor, num_steps: int, *, stateful: bool) -> Twins | None:
    """The compiled passes for these inputs, or None where the reference has to run.

    The first call for a rule, T and dtype compiles, which takes seconds; the answer is the same on every rank of a
    machine, and so are the numbers, as the two forms agree bit for bit in spikes and potentials.
    """
    if _told or num_steps > MAX_STEPS or x.shape[1] * num_steps > MAX_NEURON_STEPS:
        return None
    return _compiled(rule, num_steps, x.dtype, x.shape[0] == 1 and num_steps > 1, stateful)


class Layer(torch.autograd.Function):
    """T steps of a layer over (T, M), or over (1, M) for a current that is the same at every step."""

    @staticmethod
    def forward(ctx, x, v, leak, width, amplitude, rule: Rule, num_steps: int, tally: Tally | None, twins: Twins):
        spikes = x.new_empty((num_steps, x.shape[1]))
        with torch.autocast("cpu", enabled=False):
            count, state = twins.forward(x, v, leak, list(spikes))
        if tally is not None:
            tally.spikes.add_(count)
        ctx.save_for_backward(x, v, leak, width, amplitude)
        ctx.tally, ctx.twins = tally, twins
        return spikes, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_s, grad_state):
        x, v, leak, width, amplitude = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            covered, grad_sq, grad_leak, grad_v = ctx.twins.backward(
                grad_s.contiguous(), grad_state, x, v, leak, width, amplitude, list(grad_x)
            )
        if ctx.tally is not None:
            ctx.tally.grad_sq.add_(grad_sq)
            if covered is not None:
                ctx.tally.covered.add_(covered)
        if grad_leak is not None:
            grad_leak = grad_leak.to(leak.dtype)
        return grad_x, (grad_v if v is not None else None), grad_leak, None, None, None, None, None, None
