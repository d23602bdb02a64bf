"""The sums of a gradient that χ needs: number of non-zero elements, Σ|g| and Σg², in one pass over memory."""

import torch

from pipeline.snn.kernels import compiled, dispatch


def run_reference(gradient: torch.Tensor) -> torch.Tensor:
    """The definition: `(3,)` float64 of a gradient of any shape and floating dtype, in three passes."""
    magnitudes = torch.linalg.vector_norm(gradient, 1, dtype=torch.float64)
    norm = torch.linalg.vector_norm(gradient, 2, dtype=torch.float64)
    return torch.stack((torch.count_nonzero(gradient).double(), magnitudes, norm.square()))


def run(gradient: torch.Tensor) -> torch.Tensor:
    """As `run_reference`, by a twin if there is one; the same bits for any number of threads."""
    if not (gradient.is_contiguous() or gradient.is_contiguous(memory_format=torch.channels_last)):
        return run_reference(gradient)
    kernels = dispatch.gpu_kernels(gradient)
    if kernels is not None:
        return kernels.gradient_sums(gradient)
    library = compiled.library(gradient)
    if library is None:
        return run_reference(gradient)
    sums = torch.empty(3, dtype=torch.float64)
    library.gradient_sums(compiled.address(gradient), compiled.address(sums), gradient.numel(), torch.get_num_threads())
    return sums
