"""χ and the other indicators: definitions, and how they follow from sums over a gradient and counts over neurons.

For spiking layer ℓ, fed by the convolution W_ℓ, and the gradient G_ℓ that the optimizer is about to use (summed over
micro-batches, averaged over ranks):

    χ_ℓ              nnz(G_ℓ) / |W_ℓ|                 proportion of parameters with a non-zero gradient
    participation    (Σ|G_ℓ|)² / (|W_ℓ| ΣG_ℓ²)        effective proportion: 1 if all are equal, 1/|W_ℓ| if one is not 0
    gradient norm    √ΣG_ℓ²
    coverage         #{|h - v_th| < w_ℓ} / (T N n_ℓ)  neuron-steps inside the surrogate's support
    firing rate      #{s = 1} / (T N n_ℓ)

χ is defined as in "Efficient Surrogate Gradients for Training Spiking Neural Networks"; over all trainable parameters
it is the network's χ. The backward pass of BatchNorm makes gradients dense, so χ stays at 1 until channels die or
values underflow; participation and coverage are measured for that reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.snn.kernels import sums

PER_LAYER = ("chi", "participation", "coverage", "firing_rate", "grad_norm")


def gradient_sums(gradient: Tensor) -> Tensor:
    """`(3,)` float64: number of non-zero elements, Σ|g| and Σg² of a gradient of any shape."""
    return sums.run([gradient])[0]


def sums_of_each(gradients: Sequence[Tensor]) -> Tensor:
    """`(P, 3)` float64, `gradient_sums` of each of P gradients on one device, in one pass over all of them."""
    return sums.run(gradients)


@dataclass(frozen=True, kw_only=True, slots=True)
class Indicators:
    """One step's indicators; tensors of `(L,)` float64 on the training device, and the network's χ.

    χ, participation and gradient norm are NaN for a layer that no weight feeds (attention's).
    """

    chi: Tensor
    participation: Tensor
    coverage: Tensor
    """NaN where the surrogate has unbounded support: coverage is then undefined."""
    firing_rate: Tensor
    grad_norm: Tensor
    network_chi: Tensor

    def to_lists(self) -> dict[str, list[float]]:
        return {name: getattr(self, name).tolist() for name in PER_LAYER}


def indicators(
    layer_sums: Tensor,
    network_nnz: Tensor,
    *,
    weights: Tensor,
    parameters: int,
    spikes: Tensor,
    covered: Tensor | None,
    neuron_steps: Tensor,
) -> Indicators:
    """Indicators from the sums and counts of one step.

    Args:
        layer_sums: `(L, 3)` float64, `gradient_sums` of every layer's weight.
        network_nnz: scalar, non-zero gradients over all trainable parameters.
        weights: `(L,)` number of weights, |W_ℓ|.
        parameters: number of trainable parameters of the network.
        spikes: `(L,)` spikes, over ranks and micro-batches.
        covered: `(L,)` neuron-steps inside the support, or None where the support is unbounded.
        neuron_steps: `(L,)` neuron-steps that were counted.
    """
    nnz, magnitudes, squares = layer_sums.unbind(1)
    spread = torch.where(squares == 0, torch.zeros_like(squares), magnitudes.square() / (weights * squares))
    undefined = torch.full_like(nnz, float("nan"))
    return Indicators(
        chi=nnz / weights,
        participation=spread,
        coverage=undefined if covered is None else covered / neuron_steps,
        firing_rate=spikes / neuron_steps,
        grad_norm=squares.sqrt(),
        network_chi=network_nnz / parameters,
    )
