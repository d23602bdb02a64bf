"""Coverage and firing rate of every time step: one more look at a batch, made on request."""

import torch
from torch import Tensor, nn

from pipeline.snn.neurons import NeuronState
from pipeline.snn.potential import probed


@torch.no_grad()
def by_time_step(network: nn.Module, images: Tensor, neurons: NeuronState) -> tuple[Tensor, Tensor]:
    """Coverage and firing rate `(L, T)` of one forward pass of `images`, at the present widths.

    The network's mode decides how its batch normalisation works; in training mode its running statistics move.
    """
    coverage: list[list[Tensor]] = [[] for _ in neurons.neurons]
    rate: list[list[Tensor]] = [[] for _ in neurons.neurons]

    def see(layer: int, u: Tensor) -> None:
        coverage[layer].append((u.abs() < neurons.widths[layer]).double().mean())
        rate[layer].append((u >= 0).double().mean())

    with probed(neurons.neurons, see):
        network(images)
    return tuple(torch.stack([torch.stack(steps) for steps in layers]) for layers in (coverage, rate))  # pyright: ignore
