"""Mixup and cutmix: a micro-batch's images and labels, mixed in pairs on the device after decoding.

    mixup     x_i ← λ x_i + (1 − λ) x_π(i)            Zhang et al., "mixup", ICLR 2018
    cutmix    a box of x_i shows x_π(i)               Yun et al., "CutMix", ICCV 2019

λ ~ Beta(α, α); cutmix's box has 1 − λ of the area before it is cut at the border, and then λ is the share of x_i's
pixels that are left. The target is λ of sample i's class and 1 − λ of its partner's. The permutation π, λ and the box
are drawn once for a micro-batch, as in timm's mode `batch`, and are a pure function of (seed, stream position): a
micro-batch holds the same samples at every number of ranks, so a run that is resumed or resized mixes alike.
Evaluations are never mixed.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.config import DataConfig
from pipeline.data.decode.augment import uniform
from pipeline.data.order import mix

_DRAWS, _PARTNERS = 5, 6  # hash words that keep these draws independent of the others


class Box(NamedTuple):
    """Pixels of an image: rows [top, bottom), columns [left, right)."""

    top: int
    bottom: int
    left: int
    right: int


class Mixing(NamedTuple):
    """How a micro-batch of `m` samples is mixed."""

    partners: np.ndarray
    """π: `(m,)` int64, a permutation of the micro-batch."""
    share: float
    """λ: what a sample keeps of itself, in [0, 1]; of cutmix exactly the share of its pixels."""
    box: Box | None
    """Cutmix: where the partner's pixels are; None is mixup."""


def draw(data: DataConfig, seed: int, position: int, height: int, width: int) -> Mixing | None:
    """The mixing of the micro-batch at a stream position, for images of `height` x `width`; None leaves it as it is.

    As in timm: a micro-batch is mixed with probability `mixup_prob`; where both alphas are above 0, by cutmix with
    probability `mixup_switch_prob`, else by mixup.
    """
    if not data.mixes:
        return None
    mixed, switch, first, second, row, column = uniform(seed, position, _DRAWS, np.arange(6))
    if mixed >= data.mixup_prob:
        return None
    partners = np.argsort(mix(seed, position, _PARTNERS, np.arange(data.micro_batch)), kind="stable")
    cuts = data.cutmix > 0 and (data.mixup == 0 or switch < data.mixup_switch_prob)
    share = symmetric_beta(data.cutmix if cuts else data.mixup, float(first), float(second))
    if not cuts:
        return Mixing(partners, share, None)
    box = _box(share, float(row), float(column), height, width)
    covered = (box.bottom - box.top) * (box.right - box.left)
    return Mixing(partners, 1 - covered / (height * width), box)


def symmetric_beta(alpha: float, first: float, second: float) -> float:
    """A draw of Beta(alpha, alpha), alpha > 0, from two uniform in [0, 1).

    The sine of Student's t with 2 alpha degrees of freedom, by the polar method: L. Devroye, "Random variate generation
    in one line of code", 1996. With w = first^(1/alpha) it does not overflow for small alpha.
    """
    w, cosine = first ** (1 / alpha), float(np.cos(2 * np.pi * second))
    far = (1 - w) * cosine * cosine
    return 0.5 + 0.5 * float(np.copysign(np.sqrt(far / (w + far)), cosine))


def _box(share: float, row: float, column: float, height: int, width: int) -> Box:
    """A box with 1 − share of the area and the image's own proportions, uniformly centred, cut at the border."""
    tall, wide = (int(side * np.sqrt(1 - share)) for side in (height, width))
    top, left = int(row * height) - tall // 2, int(column * width) - wide // 2
    return Box(max(0, top), min(height, top + tall), max(0, left), min(width, left + wide))


def mixed_images(images: Tensor, mixing: Mixing, partners: Tensor) -> Tensor:
    """Images `(…, m, C, H, W)`, mixed in their dtype, in new memory of the same layout; `partners`: `partners_on`."""
    if mixing.box is None:
        return torch.lerp(images[..., partners, :, :, :], images, mixing.share)
    top, bottom, left, right = mixing.box
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images[..., partners, :, top:bottom, left:right]
    return mixed


def mixed_targets(labels: Tensor, mixing: Mixing, partners: Tensor, num_classes: int) -> Tensor:
    """`(m, num_classes)` float32 probabilities from labels `(m,)`."""
    own = functional.one_hot(labels, num_classes).float()
    return torch.lerp(own[partners], own, mixing.share)


def main_labels(labels: Tensor, mixing: Mixing, partners: Tensor) -> Tensor:
    """`(m,)`: of each mixed image, the class of the sample with the larger share of it."""
    return labels if mixing.share >= 0.5 else labels[partners]


def partners_on(mixing: Mixing, device: torch.device) -> Tensor:
    """π on the device, `(m,)` int64; the host does not wait for the copy."""
    partners = torch.from_numpy(mixing.partners)
    return partners.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else partners
