"""SEW-ResNet: residual networks that join the spikes of branch and shortcut element by element.

Source: Fang et al., "Deep Residual Learning in Spiking Neural Networks", NeurIPS 2021. A block is
`out = connect(spikes of the branch, shortcut)`; the shortcut of a block that changes shape is conv1x1, BN, neuron.
With `connect` none there is no shortcut, so the network is plain.
SpikingJelly has the same parameter names; `state_dicts.py` reads and writes the original code's.
"""

import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.snn import neurons
from pipeline.snn.kernels import packing
from pipeline.snn.networks import resnet
from pipeline.snn.networks.archs import Arch
from pipeline.snn.networks.network import SpikingLayer
from pipeline.snn.networks.resnet import ResNet, spiking_layer


def connect(kind: str, branch: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
    """Join a block's two paths: add `b + s`, and `b s`, iand `(1 - b) s`, none `b`."""
    if kind == "none":
        return branch
    if kind == "add":
        return branch + shortcut
    if kind == "and":
        return branch * shortcut
    if kind == "iand":
        return (1 - branch) * shortcut
    raise ConfigError(f"model.connect={kind!r} is not allowed; use one of add, and, iand, none")


class Block(resnet.Block):
    """Convolution, BN, neuron, two (basic) or three (bottleneck) times, joined with the shortcut."""

    def __init__(self, model: ModelConfig, arch: Arch, c_in: int, channels: int, stride: int, largest_in: int) -> None:
        super().__init__()
        self.connect, self.checkpoint = model.connect, model.checkpoint
        self.bits_in = packing.bits_for(largest_in)
        if arch.block == "basic":
            shapes = [(c_in, channels, 3, stride), (channels, channels, 3, 1)]
        else:
            # The stride sits on the 3x3, as in torchvision's ResNet and the SEW code.
            shapes = [(c_in, channels, 1, 1), (channels, channels, 3, stride), (channels, 4 * channels, 1, 1)]
        self.depth, self.c_out = len(shapes), shapes[-1][1]
        for i, (before, after, kernel, step) in enumerate(shapes, 1):
            self.add_module(f"conv{i}", nn.Conv2d(before, after, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(after))
            self.add_module(f"sn{i}", neurons.from_config(model))
        self.downsample = self.downsample_sn = None
        if self.connect != "none" and (stride != 1 or c_in != self.c_out):
            conv = nn.Conv2d(c_in, self.c_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(self.c_out))
            self.downsample_sn = neurons.from_config(model)

    def feeds(self) -> list[tuple[str, nn.Module, nn.Module]]:
        """Each neuron's name in the block with the convolution and normalisation that feed it, in forward order."""
        inner = [(f"sn{i}", f"conv{i}", f"bn{i}") for i in range(1, self.depth + 1)]
        feeds = [(sn, self.get_submodule(conv), self.get_submodule(bn)) for sn, conv, bn in inner]
        if self.downsample is not None:
            conv, norm = self.downsample
            feeds.append(("downsample_sn", conv, norm))
        return feeds

    def forward(self, x: torch.Tensor, T: int) -> torch.Tensor:
        kept = packing.Packed(x, self.bits_in) if self.training and self.bits_in else None
        shortcut = x
        if self.downsample is not None:
            conv, bn = self.downsample
            shortcut = self._layer(x, kept, conv, bn, self.downsample_sn, T)
        for i in range(1, self.depth + 1):
            last = i == self.depth
            # Only `add` is fused: and, iand need the spikes of the branch in the backward pass.
            added = shortcut if last and self.connect == "add" else None
            conv, bn, neuron = (self.get_submodule(f"{part}{i}") for part in ("conv", "bn", "sn"))
            x = self._layer(x, kept, conv, bn, neuron, T, added)
            kept = packing.Packed(x, 1) if self.training and not last else None
        return x if self.connect == "add" else connect(self.connect, x, shortcut)

    def _layer(self, x, kept, conv, bn, neuron, T: int, shortcut: torch.Tensor | None = None) -> torch.Tensor:
        again = packing.convolve_again(x, kept, conv) if self.checkpoint and self.training else None
        return neuron.after_norm(packing.conv2d(x, kept, conv), bn, T, shortcut=shortcut, again=again)


class SEWResNet(ResNet):
    """The network: images `(N, C, H, W)` or event frames `(T, N, C, H, W)` to logits `(T, N, K)`.

    For images, the stem's convolution and BN run once, and the first neurons get their output at every step.
    """

    def __init__(self, model: ModelConfig, *, num_classes: int, in_channels: int = 3) -> None:
        arch = resnet.arch_of(model, "sew")
        super().__init__(model, arch, in_channels)
        self.sn1 = neurons.from_config(model)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if arch.stem == "imagenet" else nn.Identity()
        largest = 1

        def block(c_in: int, channels: int, stride: int) -> Block:
            nonlocal largest
            made = Block(model, arch, c_in, channels, stride, largest)
            # Each block adds one to the largest sum; it starts again where the shortcut has its own neurons.
            largest = 1 if model.connect != "add" else 2 if made.downsample is not None else largest + 1
            return made

        self.add_stages(arch, block)
        self.add_classifier(num_classes)
        self._initialise(model)

    def _initialise(self, model: ModelConfig) -> None:
        self.start_convolutions()
        if model.zero_init_residual:
            for _, block in self.blocks():
                last: nn.BatchNorm2d = block.get_submodule(f"bn{block.depth}")  # pyright: ignore[reportAssignmentType]
                nn.init.zeros_(last.weight)
                # add, iand: the branch is silent. and: it fires at every step. So the block starts as its shortcut.
                nn.init.constant_(last.bias, model.v_th * max(1.0, model.tau) if model.connect == "and" else 0.0)

    def blocks(self) -> list[tuple[str, Block]]:
        return super().blocks()  # pyright: ignore[reportReturnType]

    def spiking_layers(self) -> list[SpikingLayer]:
        """The neuron layers with the weights that feed them, in forward order."""
        layers = [spiking_layer("sn1", self.sn1, self.conv1, self.bn1)]
        for name, block in self.blocks():
            layers += [spiking_layer(f"{name}.{sn}", block.get_submodule(sn), *feed) for sn, *feed in block.feeds()]
        return layers

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        frames, T, static = self.frames(images)
        again = packing.convolve_again(frames, None, self.conv1) if self.checkpoint and self.training else None
        spikes = self.sn1.after_norm(self.conv1(frames), self.bn1, T, static=static, again=again)
        x = packing.max_pool2d(spikes, self.maxpool)
        for _, block in self.blocks():
            x = block(x, T)
        return self.classify(x, T)


def build(model: ModelConfig, *, num_classes: int, in_channels: int = 3, image_size: int) -> SEWResNet:
    """A SEW-ResNet; arguments and errors as of `build.build`."""
    network = SEWResNet(model, num_classes=num_classes, in_channels=in_channels)
    resnet.require_size(model, image_size)
    return network
