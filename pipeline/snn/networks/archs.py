"""Names and shapes of the networks. It does not import torch: configurations are checked before torch is loaded."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """Shape of one network: a stem, then stages of residual blocks."""

    stem: Literal["imagenet", "cifar"]
    """imagenet: 7x7 stride 2, then 3x3 max-pooling of the spikes; cifar: 3x3 stride 1."""
    block: Literal["basic", "bottleneck"]
    blocks: tuple[int, ...]
    """Residual blocks in each stage; every stage but the first halves the side."""
    channels: tuple[int, ...]
    """Channels of each stage, before a bottleneck's expansion by 4."""


_IMAGENET = (64, 128, 256, 512)
_CIFAR = (16, 32, 64)

TABLE: dict[str, Arch] = {
    "sew_tiny": Arch(stem="cifar", block="basic", blocks=(1, 1), channels=(16, 32)),
    "sew_cifar8": Arch(stem="cifar", block="basic", blocks=(1, 1, 1), channels=_CIFAR),
    "sew_cifar14": Arch(stem="cifar", block="basic", blocks=(2, 2, 2), channels=_CIFAR),
    "sew_cifar20": Arch(stem="cifar", block="basic", blocks=(3, 3, 3), channels=_CIFAR),
    "sew_cifar26": Arch(stem="cifar", block="basic", blocks=(4, 4, 4), channels=_CIFAR),
    "sew_cifar32": Arch(stem="cifar", block="basic", blocks=(5, 5, 5), channels=_CIFAR),
    "sew_cifar56": Arch(stem="cifar", block="basic", blocks=(9, 9, 9), channels=_CIFAR),
    "sew_resnet18": Arch(stem="imagenet", block="basic", blocks=(2, 2, 2, 2), channels=_IMAGENET),
    "sew_resnet34": Arch(stem="imagenet", block="basic", blocks=(3, 4, 6, 3), channels=_IMAGENET),
    "sew_resnet50": Arch(stem="imagenet", block="bottleneck", blocks=(3, 4, 6, 3), channels=_IMAGENET),
    "sew_resnet101": Arch(stem="imagenet", block="bottleneck", blocks=(3, 4, 23, 3), channels=_IMAGENET),
    "sew_resnet152": Arch(stem="imagenet", block="bottleneck", blocks=(3, 8, 36, 3), channels=_IMAGENET),
}

ARCHS: tuple[str, ...] = tuple(TABLE)
"""Every name of a network."""
