"""Parallel spiking neurons (PSN) as a network of one's own: a product with a learned matrix over time, no reset.

    python -m launch.local --recipe digits --model.arch docs/network_psn.py:network --run_dir runs/psn
    python -m launch.local --recipe digits --model.arch docs/network_psn.py:sliding --run_dir runs/sliding_psn

Source: Fang et al., "Parallel Spiking Neurons with High Efficiency and Ability to Learn Long-term Dependencies",
NeurIPS 2023. See pipeline/snn/networks/own.py for what such a file must do.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.snn.external_neurons import Surrogate

CHANNELS, HIDDEN = (16, 32, 64), 128
"""Of each stage's convolution, which a 2x2 max-pooling follows; of the hidden layer."""
ORDER = 2
"""Time steps that a sliding neuron sees."""


class PSN(nn.Module):
    """h = W x + b over time, s = 1[h >= 0]: currents (T, ...) to spikes (T, ...). W is learned, (T, T), and so is the
    threshold -b of every step: a spike may depend on currents that come after it."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(model.T, model.T))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.bias = nn.Parameter(torch.full((model.T, 1), -model.v_th))
        self.surrogate = Surrogate(model.surrogate, model.scale, model.width)  # called on h - v_th, T steps at once

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.surrogate(torch.addmm(self.bias, self.weight, x.flatten(1)).view(x.shape))


class SlidingPSN(nn.Module):
    """h[t] = Σ w[i] x[t - k + 1 + i] + b over the last k steps, s = 1[h >= 0]: (T, ...) to (T, ...), of any T. The k
    weights start as those of a leaky neuron, ..., 1/4, 1/2, 1."""

    def __init__(self, model: ModelConfig, k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.5 ** torch.arange(k - 1.0, -1, -1))
        self.bias = nn.Parameter(torch.full((1,), -model.v_th))
        self.surrogate = Surrogate(model.surrogate, model.scale, model.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        T, k = len(x), len(self.weight)
        diagonals = [torch.diag(self.weight[k - 1 - lag].expand(T - lag), -lag) for lag in range(min(k, T))]
        matrix = torch.stack(diagonals).sum(0)
        return self.surrogate(torch.addmm(self.bias, matrix, x.flatten(1)).view(x.shape))


class Layer(nn.Module):
    """Convolution or linear layer, batch normalisation, neurons: (T, N, ...) to spikes (T, N, ...)."""

    def __init__(self, weight: nn.Module, norm: nn.Module, neurons: nn.Module, T: int) -> None:
        super().__init__()
        self.weight, self.norm, self.neurons, self.T = weight, norm, neurons, T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        current = self.norm(self.weight(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        return self.neurons(current.expand(self.T, *current.shape[1:]))


class Network(nn.Module):
    def __init__(
        self, T: int, make: Callable[[], nn.Module], num_classes: int, in_channels: int, image_size: int
    ) -> None:
        super().__init__()
        self.features, c = nn.ModuleList(), in_channels
        for channels in CHANNELS:
            conv = nn.Conv2d(c, channels, 3, padding=1, bias=False)
            self.features.append(Layer(conv, nn.BatchNorm2d(channels), make(), T))
            c = channels
        side = image_size // 2 ** len(CHANNELS)
        self.hidden = Layer(nn.Linear(c * side**2, HIDDEN, bias=False), nn.BatchNorm1d(HIDDEN), make(), T)
        self.classifier = nn.Linear(HIDDEN, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images[None] if images.dim() == 4 else images  # a still image is one step, which the first layer repeats
        for layer in self.features:
            spikes = layer(x)
            x = nn.functional.max_pool2d(spikes.flatten(0, 1), 2).unflatten(0, spikes.shape[:2])
        return self.classifier(self.hidden(x.flatten(2)))


def network(model: ModelConfig, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    return Network(model.T, lambda: PSN(model), num_classes, in_channels, image_size)


def sliding(model: ModelConfig, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    return Network(model.T, lambda: SlidingPSN(model, ORDER), num_classes, in_channels, image_size)
