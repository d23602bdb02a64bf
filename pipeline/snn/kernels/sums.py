"""The sums of a gradient that χ needs: number of non-zero elements, Σ|g| and Σg², in one pass over memory.

All gradients of a step are counted by one call, wherever they lie: on the CPU one parallel loop, on a GPU two launches.
"""

import ctypes
from collections.abc import Sequence

import torch

from pipeline.snn.kernels import compiled, dispatch


def run_reference(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The definition: `(P, 3)` float64 of P gradients of any shape and floating dtype, three passes over each."""
    return torch.stack([_sums(gradient) for gradient in gradients])


def run(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """As `run_reference`, by a twin if there is one; the same bits for any number of threads.

    Args:
        gradients: P of them, at least one, on one device.
    """
    kinds = dict.fromkeys(gradient.dtype for gradient in gradients)
    if len(kinds) == 1:
        return _of_one_dtype([_dense(gradient) for gradient in gradients])
    rows: dict[int, torch.Tensor] = {}
    for kind in kinds:
        places = [place for place, gradient in enumerate(gradients) if gradient.dtype == kind]
        rows |= zip(places, _of_one_dtype([_dense(gradients[place]) for place in places]), strict=True)
    return torch.stack([rows[place] for place in range(len(gradients))])


def _of_one_dtype(gradients: list[torch.Tensor]) -> torch.Tensor:
    if dispatch.gpu_kernels(gradients[0]) is not None:
        from pipeline.snn.kernels import sums_triton  # not at the top: Triton may be absent

        return sums_triton.run(gradients)
    library = compiled.library(gradients[0])
    if library is None:
        return run_reference(gradients)
    P = len(gradients)
    addresses = (ctypes.c_void_p * P)(*map(compiled.address, gradients))
    numels = (ctypes.c_long * P)(*(gradient.numel() for gradient in gradients))
    sums = torch.empty(P, 3, dtype=torch.float64)
    library.gradient_sums(addresses, numels, compiled.address(sums), P, torch.get_num_threads())
    return sums


def _sums(gradient: torch.Tensor) -> torch.Tensor:
    magnitudes = torch.linalg.vector_norm(gradient, 1, dtype=torch.float64)
    norm = torch.linalg.vector_norm(gradient, 2, dtype=torch.float64)
    return torch.stack((torch.count_nonzero(gradient).double(), magnitudes, norm.square()))


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient, or a copy of one whose elements do not lie one after the other; their order is of no matter."""
    dense = gradient.is_contiguous() or gradient.is_contiguous(memory_format=torch.channels_last)
    return gradient if dense else gradient.contiguous()
