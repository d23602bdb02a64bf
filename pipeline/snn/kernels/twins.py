"""Which twin serves a tensor: C++ on the CPU, Triton on a GPU, or none, and then the reference runs."""

import functools
import logging
from typing import TYPE_CHECKING

import torch

from pipeline.snn.kernels import compiled
from pipeline.snn.kernels.reference import Rule

if TYPE_CHECKING:
    from pipeline.snn.kernels import fused_triton

    Call = compiled.Call | fused_triton.Call
else:
    Call = compiled.Call

log = logging.getLogger(__name__)

_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _triton():
    """The GPU kernels; None, said once, where Triton is not installed."""
    try:
        from pipeline.snn.kernels import fused_triton
    except ImportError as error:
        log.warning("spiking layers run the slower reference on the GPU: %s; install triton", error)
        return None
    return fused_triton


def gpu_kernels(x: torch.Tensor):
    """The Triton module for a tensor on a GPU in a dtype that it covers, or None."""
    return _triton() if x.is_cuda and x.dtype in _GPU_DTYPES else None


def choose(x: torch.Tensor, rule: Rule) -> type[Call] | None:
    """The twin's `Call` class for a tensor, or None for the reference.

    A function of device, dtype and what the machine has, so that all ranks of a machine choose the same.
    `torch.export` and `torch.compile` trace the reference: they cannot look into foreign kernels.
    """
    if not x.numel() or torch.compiler.is_compiling():
        return None
    if x.is_cuda:
        kernels = gpu_kernels(x)
        return kernels.Call if kernels is not None else None
    return compiled.Call if compiled.library(x, rule) is not None else None
