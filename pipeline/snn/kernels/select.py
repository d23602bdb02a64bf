"""Which form of the op runs: the reference, or a twin that gives the same numbers faster."""

import torch

from pipeline.snn.kernels import compiled, reference
from pipeline.snn.kernels.reference import Rule, Tally

MIN_NEURON_STEPS = 1 << 14
"""Below this many neuron-steps in a call the reference runs: compiling takes seconds and there is little to gain.
A function of the shape alone, so that every run and every rank of a machine chooses the same."""

_NATIVE = (torch.float32, torch.bfloat16, torch.float16)


def run(
    x: torch.Tensor,
    rule: Rule,
    width: torch.Tensor,
    amplitude: torch.Tensor,
    *,
    num_steps: int | None = None,
    leak: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    tally: Tally | None = None,
    want_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """T steps of one layer; `reference.run` is the definition.

    Args:
        x: input current, (T, ...) in any dense memory format; or (1, ...) with `num_steps` = T for a current that is
            the same at every step, which is then neither copied nor kept T times.
        rule, width, amplitude, leak, v, tally: as in `reference.run`.
        num_steps: T, where x holds a single step.
        want_state: return the potential after the last step too.

    Returns:
        Spikes (T, ...) in x's dtype and memory format, and the potential (...) or None.
    """
    T = x.shape[0] if num_steps is None else num_steps
    twins = None
    if x.device.type == "cpu" and x.dtype in _NATIVE and x[0].numel() * T >= MIN_NEURON_STEPS:
        flat, order = _flatten(x)
        stateful = want_state or v is not None
        twins = compiled.twins(rule, flat, T, stateful=stateful)
        if twins is not None:
            v_flat = None if v is None else _flatten_like(v.to(torch.float32), order)
            if stateful and v_flat is None:
                v_flat = torch.full_like(flat[0], rule.v_reset, dtype=torch.float32)
            spikes, state = compiled.Layer.apply(flat, v_flat, leak, width, amplitude, rule, T, tally, twins)
            shape = (T, *x.shape[1:])
            return _restore(spikes, shape, order), (
                _restore(state[None], (1, *shape[1:]), order)[0] if want_state else None
            )
    if x.shape[0] != T:
        x = x.expand(T, *x.shape[1:])
    spikes, state = reference.run(x, rule, width, amplitude, leak=leak, v=v, tally=tally)
    return spikes, (state if want_state else None)


def _flatten(x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """x as (T, M) in the order its elements lie in memory, and that order of the dimensions; copies if not dense."""
    order = (0, *sorted(range(1, x.dim()), key=lambda dim: (-x.stride(dim), dim)))
    return x.permute(order).contiguous().flatten(1), order


def _flatten_like(v: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    return v[None].permute(order).contiguous().flatten()


def _restore(flat: torch.Tensor, shape: tuple[int, ...], order: tuple[int, ...]) -> torch.Tensor:
    inverse = [order.index(dim) for dim in range(len(order))]
    return flat.view([shape[dim] for dim in order]).permute(inverse)
