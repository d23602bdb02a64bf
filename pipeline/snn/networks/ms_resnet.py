"""MS-ResNet: residual networks whose shortcut carries membrane currents, past all neurons.

Source: Hu et al., "Advancing Spiking Neural Networks Toward Deep Residual Learning", IEEE TNNLS 2024, arXiv 2112.08954.

    x     = BN(conv(images))
    block:  x = BN(conv(spikes(BN(conv(spikes(x)))))) + shortcut(x)
            shortcut(x) = x, or BN(conv1x1(x)) where the shape changes
    logits = fc(mean over positions of spikes(x))

So every convolution of a branch gets spikes, 0 or 1; the few of the shortcuts get currents.

Which weights feed a layer. The neurons in the middle of a block: the convolution before them. The others see a sum, to
which all convolutions on the stream since its last change of shape have added; W_ℓ is the one that added last, the
second of the block before, or the stem's. So every convolution feeds one layer, but for those of the shortcuts, which
count in χ of the network alone.
"""

import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.snn import neurons
from pipeline.snn.kernels import norm, packing
from pipeline.snn.networks import resnet
from pipeline.snn.networks.network import SpikingLayer
from pipeline.snn.networks.resnet import ResNet, spiking_layer
from pipeline.snn.neurons import Neuron


class Block(resnet.Block):
    """Neurons, convolution, BN, twice; then the shortcut's currents are added.

    Its input may be one step, (N, C, H, W), of currents that are the same at all T; its output is (T*N, C, H, W).
    """

    def __init__(self, model: ModelConfig, c_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.checkpoint, self.c_out = model.checkpoint, channels
        self.sn1 = neurons.from_config(model)
        self.conv1 = nn.Conv2d(c_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.sn2 = neurons.from_config(model)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or c_in != channels:
            conv = nn.Conv2d(c_in, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor, T: int, static: bool = False) -> torch.Tensor:
        shortcut = x if self.downsample is None else self._current(x, None, *self.downsample)
        spikes = fire(self.sn1, x, T, static)
        kept = self._packed(spikes)
        again = self._again(spikes, kept, self.conv1)
        spikes = self.sn2.after_norm(packing.conv2d(spikes, kept, self.conv1), self.bn1, T, again=again)
        branch = self._current(spikes, self._packed(spikes), self.conv2, self.bn2)
        if not static:
            return branch + shortcut
        return (branch.unflatten(0, (T, -1)) + shortcut).flatten(0, 1)

    def _packed(self, spikes: torch.Tensor) -> packing.Packed | None:
        return packing.Packed(spikes, 1) if self.training else None

    def _again(self, x: torch.Tensor, kept: packing.Packed | None, conv: nn.Conv2d) -> packing.Again | None:
        return packing.convolve_again(x, kept, conv) if self.checkpoint and self.training else None

    def _current(self, x, kept, conv, bn) -> torch.Tensor:
        """BN(conv(x)), for a sum."""
        again = self._again(x, kept, conv)
        return norm.batch_norm(packing.conv2d(x, kept, conv), bn, again=again, ranks=self.sn1.ranks)


def fire(neuron: Neuron, x: torch.Tensor, T: int, static: bool) -> torch.Tensor:
    """Spikes (T*N, C, H, W) of currents (T*N, C, H, W), or (N, C, H, W) where they are the same at all T."""
    steps = x[None] if static else x.unflatten(0, (T, -1))
    return neuron(steps, T).flatten(0, 1)


class MSResNet(ResNet):
    """The network: images `(N, C, H, W)` or event frames `(T, N, C, H, W)` to logits `(T, N, K)`.

    For images, the currents stay the same at all T up to the first branch: stem and first shortcut run once.

    Raises:
        ConfigError: `model.connect` is not add.
    """

    def __init__(self, model: ModelConfig, *, num_classes: int, in_channels: int = 3) -> None:
        if model.connect != "add":
            raise ConfigError(
                f"model.connect={model.connect!r} is not allowed with model.arch={model.arch!r}, whose shortcut adds "
                "currents; use add, or a sew network"
            )
        arch = resnet.arch_of(model, "ms")
        super().__init__(model, arch, in_channels)
        # Where SEW-ResNet pools the spikes of the stem, the first stage halves the side.
        first_stride = 2 if arch.stem == "imagenet" else 1
        self.add_stages(arch, lambda *shape: Block(model, *shape), first_stride=first_stride)
        self.sn_out = neurons.from_config(model)
        self.add_classifier(num_classes)
        self._initialise(model)

    def _initialise(self, model: ModelConfig) -> None:
        self.start_convolutions()
        # As in the original code: currents of about the size that one step needs to reach the threshold.
        threshold = model.v_th * (model.tau if model.neuron != "if" else 1.0)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, threshold)
        if model.zero_init_residual:
            for _, block in self.blocks():
                nn.init.zeros_(block.bn2.weight)

    def blocks(self) -> list[tuple[str, Block]]:
        return super().blocks()  # pyright: ignore[reportReturnType]

    def spiking_layers(self) -> list[SpikingLayer]:
        """The neuron layers with the weights that feed them, in forward order; see the top of this file."""
        layers, feeding, bn = [], self.conv1, self.bn1
        for name, block in self.blocks():
            layers.append(spiking_layer(f"{name}.sn1", block.sn1, feeding, bn))
            layers.append(spiking_layer(f"{name}.sn2", block.sn2, block.conv1, block.bn1))
            feeding, bn = block.conv2, None  # what follows gets a sum, which no one BN normalises
        return [*layers, spiking_layer("sn_out", self.sn_out, feeding, bn)]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x, T, static = self.frames(images)
        again = packing.convolve_again(x, None, self.conv1) if self.checkpoint and self.training else None
        x = norm.batch_norm(self.conv1(x), self.bn1, again=again, ranks=self.sn_out.ranks)
        for _, block in self.blocks():
            x = block(x, T, static)
            static = False
        return self.classify(fire(self.sn_out, x, T, static), T)


def build(model: ModelConfig, *, num_classes: int, in_channels: int = 3, image_size: int) -> MSResNet:
    """An MS-ResNet; arguments and errors as of `build.build`."""
    network = MSResNet(model, num_classes=num_classes, in_channels=in_channels)
    resnet.require_size(model, image_size)
    return network
