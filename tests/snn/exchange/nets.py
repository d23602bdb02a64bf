"""Networks with statistics of the digits, and what their layers hand on."""

from typing import Any
from unittest import mock

import torch
from sklearn.datasets import load_digits
from torch import nn

from pipeline.config import ModelConfig
from pipeline.data.decode.dali_pipeline import MEAN, STD
from pipeline.snn.networks import sew_resnet
from pipeline.snn.networks.archs import TABLE, Arch
from pipeline.snn.networks.build import build

K = 10
SMALL = {"small_bottleneck": Arch(stem="imagenet", block="bottleneck", blocks=(1,), channels=(8,))}
"""With what the ImageNet networks have, max-pooling and blocks of three convolutions, and few weights."""


def digits(number: int, size: int = 16) -> torch.Tensor:
    """Images of scikit-learn's digits, (number, 3, size, size) fp64, normalised as the loader does."""
    grey = torch.from_numpy(load_digits(return_X_y=True)[0][:number].reshape(-1, 8, 8)) * (255 / 16)
    colour = grey[:, None].expand(-1, 3, -1, -1)
    larger = nn.functional.interpolate(colour, (size, size), mode="bilinear")
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    return (larger - mean) / std


def frames(number: int, T: int, size: int = 16) -> torch.Tensor:
    """Event frames (T, number, 2, size, size) fp64: counts of what becomes darker and brighter as the digits move."""
    grey = digits(number, size)[:, 0]
    moved = torch.stack([grey.roll((t, 2 * t), (1, 2)) for t in range(T + 1)])
    change = moved.diff(dim=0)
    return torch.stack((-change, change), 2).clamp(min=0).round()


def network(arch: str = "sew_tiny", size: int = 16, *, events: bool = False, **model) -> Any:
    """A network in fp64 and evaluation mode, whose layers all fire: its BN has been trained, and shifted.

    With `events` it takes frames of two channels.
    """
    torch.manual_seed(0)
    config = ModelConfig(arch=arch, **{"v_th": 0.5, **model})
    make = sew_resnet.build if arch in SMALL else build  # which knows the names of configurations alone
    with mock.patch.dict(TABLE, SMALL):
        net = make(config, num_classes=K, in_channels=2 if events else 3, image_size=size).double()
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = 1.0  # the statistics of one batch
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -0.1, 0.5)
    with torch.no_grad():
        net.train()(frames(16, config.T, size) if events else digits(16, size))
    return net.eval()


def handed_on(net: nn.Module, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What each convolution and linear layer of `net` read, by name with _ for dots, and the logits (T, N, K).

    Those are all spikes of all layers, and the sums of them that a shortcut makes.
    """
    read: dict[str, torch.Tensor] = {}

    def look(name: str):
        return lambda _, inputs: read.update({name: inputs[0]})

    hooks = [
        module.register_forward_pre_hook(look(name))
        for name, module in net.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        logits = net(images)
    for hook in hooks:
        hook.remove()
    return {name.removeprefix("steps.").replace(".", "_"): x for name, x in read.items()}, logits
