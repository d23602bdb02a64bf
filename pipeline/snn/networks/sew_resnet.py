"""SEW-ResNet: residual networks that join the spikes of branch and shortcut element by element.

Source: Fang et al., "Deep Residual Learning in Spiking Neural Networks", NeurIPS 2021. A block is
`out = connect(spikes of the branch, shortcut)`; the shortcut of a block that changes shape is conv1x1, BN, neuron.
With `connect` none there is no shortcut, so the network is plain.
Parameter names are torchvision's, which SpikingJelly keeps; `state_dicts.py` reads and writes the original code's.
"""

import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.snn import neurons
from pipeline.snn.kernels import packing
from pipeline.snn.networks.archs import ARCHS, TABLE, Arch
from pipeline.snn.networks.network import Network, SpikingLayer
from pipeline.snn.neurons import Neuron


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


class Block(nn.Module):
    """Convolution, BN, neuron, two (basic) or three (bottleneck) times, joined with the shortcut.

    Tensors inside the network are (T*N, C, H, W): time and batch are one dimension to convolutions and BN.
    """

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


def _spiking_layer(name: str, neuron: nn.Module, conv: nn.Module, norm: nn.Module) -> SpikingLayer:
    assert isinstance(neuron, Neuron)
    assert isinstance(conv.weight, nn.Parameter)
    assert isinstance(norm, nn.BatchNorm2d)
    return SpikingLayer(name, neuron, conv.weight, norm)


class SEWResNet(Network):
    """The network: images `(N, C, H, W)` or event frames `(T, N, C, H, W)` to logits `(T, N, K)`.

    For images, the stem's convolution and BN run once, and the first neurons get their output at every step.
    """

    def __init__(self, model: ModelConfig, *, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        if model.arch not in TABLE:
            raise ConfigError(f"model.arch={model.arch!r} is not allowed; use one of {', '.join(ARCHS)}")
        arch = TABLE[model.arch]
        self.T, self.in_channels, self.checkpoint = model.T, in_channels, model.checkpoint
        c = arch.channels[0]
        kernel, stride = (7, 2) if arch.stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(in_channels, c, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.sn1 = neurons.from_config(model)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if arch.stem == "imagenet" else nn.Identity()
        self.num_stages, largest = len(arch.blocks), 1
        for stage, (num_blocks, channels) in enumerate(zip(arch.blocks, arch.channels, strict=True), 1):
            blocks = nn.Sequential()
            for index in range(num_blocks):
                block = Block(model, arch, c, channels, 2 if stage > 1 and index == 0 else 1, largest)
                blocks.append(block)
                # Each block adds one to the largest sum; it starts again where the shortcut has its own neurons.
                largest = 1 if model.connect != "add" else 2 if block.downsample is not None else largest + 1
                c = block.c_out
            self.add_module(f"layer{stage}", blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(c, num_classes)
        self._initialise(model)

    def _initialise(self, model: ModelConfig) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if model.zero_init_residual:
            for _, block in self.blocks():
                last: nn.BatchNorm2d = block.get_submodule(f"bn{block.depth}")  # pyright: ignore[reportAssignmentType]
                nn.init.zeros_(last.weight)
                # add, iand: the branch is silent. and: it fires at every step. So the block starts as its shortcut.
                nn.init.constant_(last.bias, model.v_th * max(1.0, model.tau) if model.connect == "and" else 0.0)

    def blocks(self) -> list[tuple[str, Block]]:
        """Every residual block with its dotted name, in forward order."""
        stages = range(1, self.num_stages + 1)
        return [
            (f"layer{i}.{j}", block)  # pyright: ignore[reportReturnType]
            for i in stages
            for j, block in self.get_submodule(f"layer{i}").named_children()
        ]

    def spiking_layers(self) -> list[SpikingLayer]:
        """The neuron layers with the weights that feed them, in forward order."""
        layers = [_spiking_layer("sn1", self.sn1, self.conv1, self.bn1)]
        for name, block in self.blocks():
            layers += [_spiking_layer(f"{name}.{sn}", block.get_submodule(sn), *feed) for sn, *feed in block.feeds()]
        return layers

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.dim() not in (4, 5) or images.shape[-3] != self.in_channels:
            raise ValueError(
                f"images of shape {tuple(images.shape)} are not allowed; use (N, {self.in_channels}, H, W), "
                f"or (T, N, {self.in_channels}, H, W) for event frames"
            )
        static = images.dim() == 4
        T = self.T if static else images.shape[0]
        frames = images if static else images.flatten(0, 1)
        frames = frames.contiguous(memory_format=torch.channels_last)
        again = packing.convolve_again(frames, None, self.conv1) if self.checkpoint and self.training else None
        spikes = self.sn1.after_norm(self.conv1(frames), self.bn1, T, static=static, again=again)
        x = packing.max_pool2d(spikes, self.maxpool)
        for _, block in self.blocks():
            x = block(x, T)
        logits = self.fc(self.avgpool(x).flatten(1))
        return logits.unflatten(0, (T, -1))


def build(model: ModelConfig, *, num_classes: int, in_channels: int = 3, image_size: int) -> SEWResNet:
    """The network that a configuration names, with fresh weights from torch's default generator.

    Args:
        model: the configuration.
        num_classes: K, at least 1.
        in_channels: C of the images: 3 for colour, 1 for grey, 2 for event frames.
        image_size: H = W of the images, in pixels; at least the network's total stride.

    Raises:
        ConfigError: unknown architecture, neuron or connection; an image smaller than the network's stride.
    """
    network = SEWResNet(model, num_classes=num_classes, in_channels=in_channels)
    arch = TABLE[model.arch]
    smallest = (4 if arch.stem == "imagenet" else 1) * 2 ** (len(arch.blocks) - 1)
    if image_size < smallest:
        raise ConfigError(
            f"data.image_size={image_size} is too small for model.arch={model.arch!r}; use {smallest} or more"
        )
    # Activations are channels-last, weights are not: DeepSpeed broadcasts these as bytes and needs a last stride of 1.
    return network
