"""Which form of the op runs: the reference, or a twin that gives the same numbers faster."""

import torch

from pipeline.snn.kernels import compiled, reference, twins
from pipeline.snn.kernels.chunked import in_chunks
from pipeline.snn.kernels.reference import Rule, Tally


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

    Raises:
        ValueError: x holds neither one step nor T; v is not of x's shape without time.
    """
    T = x.shape[0] if num_steps is None else num_steps
    if x.shape[0] not in (1, T):
        raise ValueError(
            f"x holds {x.shape[0]} steps and num_steps={T}; use {T}, or 1 for a current that stays the same"
        )
    if v is not None and v.shape != x.shape[1:]:
        raise ValueError(f"v of shape {tuple(v.shape)} is not allowed; use {tuple(x.shape[1:])}, as x without its time")
    call_type = twins.choose(x, rule)
    if call_type is not None:
        flat, order = _flatten(x)
        call = call_type(
            rule=rule,
            num_steps=T,
            num_channels=1,
            static=x.shape[0] == 1 and T > 1,
            width=width,
            amplitude=amplitude,
            leak=leak,
            tally=tally,
        )
        v_flat = None if v is None else v.float()[None].permute(order).contiguous().flatten()
        spikes, state = compiled.Layer.apply(flat, v_flat, leak, width, amplitude, in_chunks(call), want_state)
        last = _restore(state[None], (1, *x.shape[1:]), order)[0] if want_state else None
        return _restore(spikes, (T, *x.shape[1:]), order), last
    if x.shape[0] != T:
        x = x.expand(T, *x.shape[1:])
    spikes, state = reference.run(x, rule, width, amplitude, leak=leak, v=v, tally=tally)
    return spikes, (state if want_state else None)


def _flatten(x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """x as (T, M) in the order its elements lie in memory, and that order of the dimensions; copies if not dense."""
    order = (0, *sorted(range(1, x.dim()), key=lambda dim: (-x.stride(dim), dim)))
    return x.permute(order).contiguous().view(x.shape[0], -1), order


def _restore(flat: torch.Tensor, shape: tuple[int, ...], order: tuple[int, ...]) -> torch.Tensor:
    inverse = [order.index(dim) for dim in range(len(order))]
    return flat.view([shape[dim] for dim in order]).permute(inverse)
