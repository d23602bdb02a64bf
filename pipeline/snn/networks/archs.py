"""Names and shapes of the networks. It does not import torch: configurations are checked before torch is loaded."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """Shape of one network: a stem, then stages of residual blocks."""

    family: Literal["sew", "ms"] = "sew"
    """sew: sew_resnet.py, where spikes are joined; ms: ms_resnet.py, where membrane currents are added."""
    stem: Literal["imagenet", "cifar"]
    """imagenet: 7x7 stride 2, and half the side again: sew by 3x3 max-pooling of the spikes, ms by its first stage;
    cifar: 3x3 stride 1."""
    block: Literal["basic", "bottleneck"] = "basic"
    blocks: tuple[int, ...]
    """Residual blocks in each stage; every stage but the first halves the side. Only sew has bottlenecks."""
    channels: tuple[int, ...]
    """Channels of each stage, before a bottleneck's expansion by 4."""


_IMAGENET = (64, 128, 256, 512)
_CIFAR = (16, 32, 64)

TABLE: dict[str, Arch] = {
    "sew_tiny": Arch(stem="cifar", blocks=(1, 1), channels=(16, 32)),
    "sew_cifar8": Arch(stem="cifar", blocks=(1, 1, 1), channels=_CIFAR),
    "sew_cifar14": Arch(stem="cifar", blocks=(2, 2, 2), channels=_CIFAR),
    "sew_cifar20": Arch(stem="cifar", blocks=(3, 3, 3), channels=_CIFAR),
    "sew_cifar26": Arch(stem="cifar", blocks=(4, 4, 4), channels=_CIFAR),
    "sew_cifar32": Arch(stem="cifar", blocks=(5, 5, 5), channels=_CIFAR),
    "sew_cifar56": Arch(stem="cifar", blocks=(9, 9, 9), channels=_CIFAR),
    "sew_resnet18": Arch(stem="imagenet", blocks=(2, 2, 2, 2), channels=_IMAGENET),
    "sew_resnet34": Arch(stem="imagenet", blocks=(3, 4, 6, 3), channels=_IMAGENET),
    "sew_resnet50": Arch(stem="imagenet", block="bottleneck", blocks=(3, 4, 6, 3), channels=_IMAGENET),
    "sew_resnet101": Arch(stem="imagenet", block="bottleneck", blocks=(3, 4, 23, 3), channels=_IMAGENET),
    "sew_resnet152": Arch(stem="imagenet", block="bottleneck", blocks=(3, 8, 36, 3), channels=_IMAGENET),
    "ms_tiny": Arch(family="ms", stem="cifar", blocks=(1, 1), channels=(16, 32)),
    "ms_cifar8": Arch(family="ms", stem="cifar", blocks=(1, 1, 1), channels=_CIFAR),
    "ms_cifar14": Arch(family="ms", stem="cifar", blocks=(2, 2, 2), channels=_CIFAR),
    "ms_cifar20": Arch(family="ms", stem="cifar", blocks=(3, 3, 3), channels=_CIFAR),
    "ms_cifar26": Arch(family="ms", stem="cifar", blocks=(4, 4, 4), channels=_CIFAR),
    "ms_cifar32": Arch(family="ms", stem="cifar", blocks=(5, 5, 5), channels=_CIFAR),
    "ms_cifar56": Arch(family="ms", stem="cifar", blocks=(9, 9, 9), channels=_CIFAR),
    "ms_resnet18": Arch(family="ms", stem="imagenet", blocks=(2, 2, 2, 2), channels=_IMAGENET),
    "ms_resnet34": Arch(family="ms", stem="imagenet", blocks=(3, 4, 6, 3), channels=_IMAGENET),
}

ARCHS: tuple[str, ...] = tuple(TABLE)
"""Every name of a network."""
