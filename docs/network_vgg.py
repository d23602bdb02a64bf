"""A spiking VGG as a network of one's own:

    python -m launch.local --recipe digits --model.arch docs/network_vgg.py:network --run_dir runs/vgg

See pipeline/snn/networks/own.py for what such a file must do.
"""

import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.snn import neurons

STAGES = ((16, 16), (32, 32), (64,))
"""Channels of each stage's convolutions; a 2x2 max-pooling ends a stage."""


class Layer(nn.Module):
    """Convolution or linear layer, batch normalisation, neurons: spikes (T, N, ...) to spikes (T, N, ...)."""

    def __init__(self, weight: nn.Module, norm: nn.Module, model: ModelConfig) -> None:
        super().__init__()
        self.weight, self.norm, self.neurons, self.T = weight, norm, neurons.from_config(model), model.T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Only neurons know of time: for all else, (T, N) is one dimension.
        current = self.norm(self.weight(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        return self.neurons(current, num_steps=self.T if len(x) == 1 else None)


class Pool(nn.Module):
    """2x2 max-pooling of spikes (T, N, C, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.max_pool2d(x.flatten(0, 1), 2).unflatten(0, x.shape[:2])


class VGG(nn.Module):
    def __init__(self, model: ModelConfig, num_classes: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        self.features, c = nn.Sequential(), in_channels
        for stage in STAGES:
            for channels in stage:
                conv = nn.Conv2d(c, channels, 3, padding=1, bias=False)
                self.features.append(Layer(conv, nn.BatchNorm2d(channels), model))
                c = channels
            self.features.append(Pool())
        side = image_size // 2 ** len(STAGES)
        self.hidden = Layer(nn.Linear(c * side**2, 128, bias=False), nn.BatchNorm1d(128), model)
        self.classifier = nn.Linear(128, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images[None] if images.dim() == 4 else images  # a still image is one step, which the first neurons repeat
        return self.classifier(self.hidden(self.features(x).flatten(2)))


def network(model: ModelConfig, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    return VGG(model, num_classes, in_channels, image_size)
