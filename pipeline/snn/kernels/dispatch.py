"""Which form of the op runs: the reference, or a twin that gives the same numbers faster."""

import functools
import logging
import subprocess
from typing import TYPE_CHECKING

import torch

from pipeline.errors import first_line
from pipeline.snn.kernels import compiled, reference
from pipeline.snn.kernels.chunked import in_chunks
from pipeline.snn.kernels.reference import Rule
from pipeline.snn.kernels.tally import Tally, meter
from pipeline.snn.surrogate import IN_KERNELS

if TYPE_CHECKING:
    from pipeline.snn.kernels import fused_triton

    Call = compiled.Call | fused_triton.Call
else:
    Call = compiled.Call

log = logging.getLogger(__name__)

_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _triton():
    """The GPU kernels; None, with one warning, if Triton is not installed or cannot compile what launches them."""
    slower = "spiking layers run the slower reference on the GPU: %s; %s"
    try:
        from pipeline.snn.kernels import fused_triton
    except ImportError as error:
        log.warning(slower, error, "install triton")
        return None
    if not compiled.gives_way():
        import triton

        try:
            hasattr(triton.runtime.driver.active, "utils")  # compiles, at the first use
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            log.warning(slower, first_line(error), "install gcc and Python's headers (python3-dev)")
            return None
    return fused_triton


def gpu_kernels(x: torch.Tensor):
    """The Triton module for a tensor on a GPU in a dtype that it covers, or None."""
    return _triton() if (x.is_cuda or compiled.gives_way()) and x.dtype in _GPU_DTYPES else None


def choose(x: torch.Tensor, rule: Rule) -> type[Call] | None:
    """The twin's `Call` class for a tensor, or None for the reference.

    It depends only on device, dtype and what the machine has, so all ranks of a machine choose the same.
    `torch.export` and `torch.compile` trace the reference: they cannot trace the kernels.
    """
    if not x.numel() or torch.compiler.is_compiling() or rule.shape not in IN_KERNELS:
        return None
    kernels = gpu_kernels(x)
    if x.is_cuda or kernels is not None:
        return kernels.Call if kernels is not None else None
    return compiled.Call if compiled.library(x, rule) is not None else None


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
            the same at every step; it is then neither copied nor kept T times.
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
    call_type = choose(x, rule)
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
        )
        v_flat = None if v is None else v.float()[None].permute(order).contiguous().flatten()
        spikes, state = compiled.Layer.apply(
            flat, v_flat, leak, width, amplitude, meter(tally, x, v, leak), in_chunks(call), want_state
        )
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
