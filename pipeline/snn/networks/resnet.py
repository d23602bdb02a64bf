"""What the residual networks of `archs.TABLE` have in common: the stem's convolution, the stages, the classifier.

A family of them (`sew_resnet.py`, `ms_resnet.py`) says what a block is and where the neurons are.
Parameter names are torchvision's.
"""

from collections.abc import Callable

import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.snn.networks.archs import TABLE, Arch
from pipeline.snn.networks.network import Network, SpikingLayer
from pipeline.snn.neurons import Neuron


class Block(nn.Module):
    """A residual block; its tensors are (T*N, C, H, W): time and batch are one dimension to convolutions and BN."""

    c_out: int
    """Channels of its output."""


class ResNet(Network):
    """The common parts, which a family's `__init__` adds in forward order.

    Activations are channels-last, weights are not: DeepSpeed broadcasts these as bytes and needs a last stride of 1.
    """

    def __init__(self, model: ModelConfig, arch: Arch, in_channels: int) -> None:
        super().__init__()
        self.T, self.in_channels, self.checkpoint = model.T, in_channels, model.checkpoint
        kernel, stride = (7, 2) if arch.stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(in_channels, arch.channels[0], kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(arch.channels[0])

    def add_stages(self, arch: Arch, make: Callable[[int, int, int], Block], *, first_stride: int = 1) -> None:
        """Adds layer1, layer2, ... Each but the first halves the side, and so does the first with `first_stride` 2.

        `make` gets a block's channels in, the channels of its stage and its stride.
        """
        self.num_stages, c = len(arch.blocks), arch.channels[0]
        for stage, (num_blocks, channels) in enumerate(zip(arch.blocks, arch.channels, strict=True), 1):
            blocks = nn.Sequential()
            for index in range(num_blocks):
                block = make(c, channels, 1 if index else 2 if stage > 1 else first_stride)
                blocks.append(block)
                c = block.c_out
            self.add_module(f"layer{stage}", blocks)

    def add_classifier(self, num_classes: int) -> None:
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.blocks()[-1][1].c_out, num_classes)

    def start_convolutions(self) -> None:
        """Fresh weights of all convolutions."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def blocks(self) -> list[tuple[str, Block]]:
        """Every residual block with its dotted name, in forward order."""
        return [
            (f"layer{stage}.{index}", block)  # pyright: ignore[reportReturnType]
            for stage in range(1, self.num_stages + 1)
            for index, block in self.get_submodule(f"layer{stage}").named_children()
        ]

    def frames(self, images: torch.Tensor) -> tuple[torch.Tensor, int, bool]:
        """What the stem gets, channels-last; T; and whether that is one step, the same at all T.

        Raises:
            ValueError: images of another shape than `forward` allows.
        """
        C = self.in_channels
        # Two channels are of event frames. One recording's (T, C, H, W) would pass for T images, each shown T times.
        allowed = (5,) if C == 2 else (4, 5)
        if images.dim() not in allowed or images.shape[-3] != C:
            still = "" if C == 2 else f"(N, {C}, H, W), or "
            raise ValueError(
                f"images of shape {tuple(images.shape)} are not allowed; use {still}(T, N, {C}, H, W) for event frames"
            )
        static = images.dim() == 4
        frames = images if static else images.flatten(0, 1)
        return frames.contiguous(memory_format=torch.channels_last), self.T if static else images.shape[0], static

    def classify(self, x: torch.Tensor, T: int) -> torch.Tensor:
        """Logits (T, N, K) of the last stage's spikes (T*N, C, H, W)."""
        return self.fc(self.avgpool(x).flatten(1)).unflatten(0, (T, -1))


def spiking_layer(name: str, neuron: nn.Module, conv: nn.Module, norm: nn.Module | None) -> SpikingLayer:
    """The layer of `neuron`, fed by `conv`; `norm` is the batch normalisation between the two, if it is alone there."""
    assert isinstance(neuron, Neuron)
    assert isinstance(conv.weight, nn.Parameter)
    assert norm is None or isinstance(norm, nn.BatchNorm2d)
    return SpikingLayer(name, neuron, conv.weight, norm)


def arch_of(model: ModelConfig, family: str) -> Arch:
    """The row of TABLE that `model.arch` names; raises ConfigError if it is not of this family."""
    names = [name for name, arch in TABLE.items() if arch.family == family]
    if model.arch not in names:
        raise ConfigError(f"model.arch={model.arch!r} is not allowed; use one of {', '.join(names)}")
    return TABLE[model.arch]


def require_size(model: ModelConfig, image_size: int) -> None:
    """Refuses images, of `image_size` x `image_size` pixels, from which a network of TABLE would leave nothing.

    Raises:
        ConfigError: they are smaller than the network's total stride.
    """
    arch = TABLE[model.arch]
    smallest = (4 if arch.stem == "imagenet" else 1) * 2 ** (len(arch.blocks) - 1)
    if image_size < smallest:
        raise ConfigError(
            f"data.image_size={image_size} is too small for model.arch={model.arch!r}; use {smallest} or more"
        )
