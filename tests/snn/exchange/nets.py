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


def network(arch: str = "sew_tiny", size: int = 16, **model) -> Any:
    """A network in fp64 and evaluation mode, whose layers all fire: its BN has been trained, and shifted."""
    torch.manual_seed(0)
    make = sew_resnet.build if arch in SMALL else build  # which knows the names of configurations alone
    with mock.patch.dict(TABLE, SMALL):
        net = make(ModelConfig(arch=arch, **{"v_th": 0.5, **model}), num_classes=K, image_size=size).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of one batch
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -0.1, 0.5)
    with torch.no_grad():
        net.train()(digits(16, size))
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
