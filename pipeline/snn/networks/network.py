"""What the rest of the pipeline needs of a network, whatever its architecture."""

from dataclasses import dataclass

import torch
from torch import nn

from pipeline.snn.external_neurons import Steered


@dataclass(frozen=True, slots=True, eq=False)
class SpikingLayer:
    """One layer of neurons and the weight that feeds it."""

    name: str
    """Dotted name of the neuron module."""
    neuron: Steered
    weight: nn.Parameter
    """W of the convolution or linear layer, (C_out, C_in, ...)."""
    norm: nn.BatchNorm2d | None = None
    """The batch normalisation between the two."""


class Network(nn.Module):
    """Images `(N, C, H, W)` or event frames `(T, N, C, H, W)` to logits `(T, N, K)`.

    `build.py` makes it. Its state dict holds all that it learned; its weights come from torch's default generator.
    """

    in_channels: int
    """C of the images: 3 for colour, 2 for event frames."""

    def spiking_layers(self) -> list[SpikingLayer]:
        """The neuron layers with the weights that feed them, in forward order; each layer has a name of its own."""
        raise NotImplementedError

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError
