"""A small Spikformer as a network of one's own: attention between spikes, without softmax.

    python -m launch.local --recipe digits --model.arch docs/network_spikformer.py:network --run_dir runs/spikformer

Source: Zhou et al., "Spikformer: When Spiking Neural Network Meets Transformer", ICLR 2023. See
pipeline/snn/networks/own.py for what such a file must do.
"""

import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.snn import neurons

DIM, HEADS, BLOCKS = 64, 4, 2
SCALE = 0.25
"""Of the attention's product, as published."""


class Linear(nn.Module):
    """Linear layer, batch normalisation, neurons: (T, N, tokens, C_in) to spikes (T, N, tokens, C_out)."""

    def __init__(self, c_in: int, c_out: int, model: ModelConfig) -> None:
        super().__init__()
        self.weight, self.norm = nn.Linear(c_in, c_out, bias=False), nn.BatchNorm1d(c_out)
        self.neurons = neurons.from_config(model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.neurons(self.norm(self.weight(x).flatten(0, 2)).unflatten(0, x.shape[:3]))


class Attention(nn.Module):
    """q k^T v of spikes: integers, which neurons turn into spikes again. No weight feeds these neurons."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (Linear(DIM, DIM, model) for _ in range(4))
        self.neurons = neurons.from_config(model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(2, 3) for part in (self.q, self.k, self.v))
        mixed = (q @ k.transpose(-1, -2) @ v) * SCALE  # (T, N, heads, tokens, C / heads)
        return self.out(self.neurons(mixed.transpose(2, 3).flatten(3)))


class Block(nn.Module):
    """Attention, then two linear layers; each is added to its input, as SEW-ResNet adds spikes."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(model)
        self.mlp = nn.Sequential(Linear(DIM, 2 * DIM, model), Linear(2 * DIM, DIM, model))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Spikformer(nn.Module):
    def __init__(self, model: ModelConfig, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.T = model.T
        self.patches = nn.ModuleList()
        for c_in, c_out in ((in_channels, DIM // 2), (DIM // 2, DIM)):
            conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
            self.patches.append(nn.ModuleList((conv, nn.BatchNorm2d(c_out), neurons.from_config(model))))
        self.blocks = nn.Sequential(*(Block(model) for _ in range(BLOCKS)))
        self.classifier = nn.Linear(DIM, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images[None] if images.dim() == 4 else images  # a still image is one step, which the first neurons repeat
        for conv, norm, neuron in self.patches:  # pyright: ignore[reportGeneralTypeIssues]
            current = norm(conv(x.flatten(0, 1))).unflatten(0, x.shape[:2])
            x = neuron(current, num_steps=self.T if len(x) == 1 else None)
            x = nn.functional.max_pool2d(x.flatten(0, 1), 2).unflatten(0, x.shape[:2])
        tokens = x.flatten(3).transpose(2, 3)  # (T, N, H W / 16, DIM)
        return self.classifier(self.blocks(tokens).mean(2))


def network(model: ModelConfig, num_classes: int, in_channels: int) -> nn.Module:
    return Spikformer(model, num_classes, in_channels)
