"""TrivialAugmentWide, RandAugment, colour jitter and random erasing: what is done to each sample, as arrays for DALI.

A pure function of (seed, epoch, sample), as crop and flip are; decode/dali_ops.py does it to the pixels, after the
resize and before the flip, which mirrors all of it.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pipeline.config import DataConfig
from pipeline.config.policy import TRIVIAL, RandAugment, rand_augment
from pipeline.data.decode.augment import TRIES, uniform

_POLICY, _JITTER, _ERASE = 7, 8, 9  # hash words that keep these draws independent of the others
NOTHING, WARP, BRIGHTNESS, BLEND, SHARPNESS, POSTERIZE, SOLARIZE, SOLARIZE_ADD, AUTOCONTRAST, EQUALIZE = range(10)
"""What DALI's graph can do to an image in a slot of a policy."""
WIDE_BINS = 31
ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), 1 / 0.3


class Slot(NamedTuple):
    """One operation for each of `n` images; a field that its kind does not use is neutral."""

    kind: np.ndarray
    """`(n,)` int32."""
    matrix: np.ndarray
    """WARP: `(n, 2, 3)` float32, from a pixel of the result to one of the image, in pixels from its top left corner."""
    of_image: np.ndarray
    """BRIGHTNESS, SHARPNESS: the factor; BLEND: the image's weight; `(n,)` float32."""
    of_grey: np.ndarray
    """BLEND: weight of the image in grey, `(n,)` float32."""
    of_mean: np.ndarray
    """BLEND: weight of its mean grey, `(n,)` float32."""
    level: np.ndarray
    """POSTERIZE: mask of the bits that stay; SOLARIZE: the level from which on pixels are inverted; SOLARIZE_ADD: what
    is added to pixels below 128; `(n,)` uint8."""


class Blend(NamedTuple):
    """Colour jitter of `n` images: `of_image x + of_grey grey(x) + of_mean mean(grey(x))`; each `(n,)` float32."""

    of_image: np.ndarray
    of_grey: np.ndarray
    of_mean: np.ndarray


class Boxes(NamedTuple):
    """Random erasing of `n` images; height and width 0 erase nothing."""

    anchors: np.ndarray
    """`(n, 2)` float32: top, left, in pixels."""
    shapes: np.ndarray
    """`(n, 2)` float32: height, width."""


def num_slots(data: DataConfig) -> int:
    """Operations of the policy `data.aa` on each image."""
    policy = rand_augment(data.aa)
    return policy.num_ops if policy is not None else int(data.aa == TRIVIAL)


def draw_changes(
    data: DataConfig, seed: int, epochs: np.ndarray, samples: np.ndarray, image_size: int
) -> list[np.ndarray]:
    """The fields of the policy's slots, of the jitter and of the boxes, one after the other; what is off has none."""
    slots = [_slot(data, number, seed, epochs, samples, image_size) for number in range(num_slots(data))]
    jitters = [_jitter(data.color_jitter, seed, epochs, samples)] if data.color_jitter else []
    boxes = [_boxes(data.reprob, seed, epochs, samples, image_size)] if data.reprob else []
    return [array for part in (*slots, *jitters, *boxes) for array in part]


# The policies.


class _Strength(NamedTuple):
    """How far the operations of a policy go at severity 1; severity s is in [0, 1], arrays of it `(n,)`."""

    shear: float
    translate: Callable[[int], float]
    """Pixels, from the side of the image."""
    rotate: float
    """Degrees."""
    enhance: float
    """Distance of the factor from 1."""
    bits: Callable[[np.ndarray], np.ndarray]
    """Bits that posterize keeps, from s."""
    threshold: Callable[[np.ndarray], np.ndarray]
    """Solarize's threshold, from s; 256 changes nothing."""


# TrivialAugmentWide as in torchvision (Müller and Hutter, ICCV 2021); RandAugment as in timm's `inc1`.
_WIDE = _Strength(0.99, lambda side: 32.0, 135.0, 0.99, lambda s: 8 - np.rint(6 * s), lambda s: 255 * (1 - s))
_RAND = _Strength(
    0.3,
    lambda side: 0.45 * side,
    30.0,
    0.9,
    lambda s: 4 - np.floor(4 * s),
    lambda s: 256 - np.floor(256 * s),
)
_WIDE_OPS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast"),
    *("sharpness", "posterize", "solarize", "autocontrast", "equalize"),
)
_RAND_OPS = (
    *("autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color", "contrast"),
    *("brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y"),
)


def _slot(data: DataConfig, number: int, seed: int, epochs: np.ndarray, samples: np.ndarray, side: int) -> Slot:
    """The operations of one slot of the policy."""
    draws = uniform(seed, epochs[:, None], samples[:, None], _POLICY, 6 * number + np.arange(6)[None])
    chosen, strong, sign, applied = draws[:, 0], draws[:, 1], np.where(draws[:, 2] < 0.5, -1.0, 1.0), draws[:, 3]
    slot, policy = _neutral(len(samples)), rand_augment(data.aa)
    if policy is None:
        ops, strength, severity = _WIDE_OPS, _WIDE, np.floor(WIDE_BINS * strong) / (WIDE_BINS - 1)
        numbers = np.floor(len(ops) * chosen)
    else:
        ops, strength, severity = _RAND_OPS, _RAND, _severity(policy, draws[:, 4], draws[:, 5])
        numbers = np.where(applied < policy.prob, np.floor(len(ops) * chosen), -1)
    for index, op in enumerate(ops):
        rows = np.flatnonzero(numbers == index)
        _write(op, slot, rows, severity[rows], sign[rows], strength, side)
    return slot


def _severity(policy: RandAugment, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The magnitude as a share of 10, with its normal spread by Box and Muller's method."""
    normal = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)
    return np.clip(policy.magnitude + policy.spread * normal, 0, 10) / 10


def _neutral(count: int) -> Slot:
    def full(value: float, dtype: type = np.float32) -> np.ndarray:
        return np.full(count, value, dtype)

    matrix = np.tile(np.eye(2, 3, dtype=np.float32), (count, 1, 1))
    return Slot(full(NOTHING, np.int32), matrix, full(1), full(0), full(0), full(0, np.uint8))


def _write(
    op: str, slot: Slot, rows: np.ndarray, severity: np.ndarray, sign: np.ndarray, strength: _Strength, side: int
) -> None:
    """Writes `op` into those rows of the slot."""
    factor = 1 + sign * severity * strength.enhance
    match op:
        case "shear_x":
            slot.kind[rows], slot.matrix[rows, 0, 1] = WARP, sign * severity * strength.shear
        case "shear_y":
            slot.kind[rows], slot.matrix[rows, 1, 0] = WARP, sign * severity * strength.shear
        case "translate_x":
            slot.kind[rows], slot.matrix[rows, 0, 2] = WARP, sign * severity * strength.translate(side)
        case "translate_y":
            slot.kind[rows], slot.matrix[rows, 1, 2] = WARP, sign * severity * strength.translate(side)
        case "rotate":
            slot.kind[rows], slot.matrix[rows] = WARP, _rotation(sign * severity * strength.rotate, side)
        case "brightness":
            slot.kind[rows], slot.of_image[rows] = BRIGHTNESS, factor
        case "color":
            slot.kind[rows], slot.of_image[rows], slot.of_grey[rows] = BLEND, factor, 1 - factor
        case "contrast":
            slot.kind[rows], slot.of_image[rows], slot.of_mean[rows] = BLEND, factor, 1 - factor
        case "sharpness":
            slot.kind[rows], slot.of_image[rows] = SHARPNESS, factor
        case "posterize":
            slot.kind[rows], slot.level[rows] = POSTERIZE, 256 - 2 ** (8 - strength.bits(severity))
        case "solarize":
            threshold = np.ceil(strength.threshold(severity))
            slot.kind[rows] = np.where(threshold < 256, SOLARIZE, NOTHING)
            slot.level[rows] = np.minimum(threshold, 255)
        case "invert":
            slot.kind[rows], slot.level[rows] = SOLARIZE, 0
        case "solarize_add":
            slot.kind[rows], slot.level[rows] = SOLARIZE_ADD, np.floor(110 * severity)
        case "autocontrast":
            slot.kind[rows] = AUTOCONTRAST
        case "equalize":
            slot.kind[rows] = EQUALIZE
        case _:
            assert op == "identity"


def _rotation(degrees: np.ndarray, side: int) -> np.ndarray:
    """`(n, 2, 3)`: about the centre of a square image."""
    cosine, sine, centre = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees)), side / 2
    across = np.stack((cosine, -sine, centre * (1 - cosine + sine)), axis=1)
    down = np.stack((sine, cosine, centre * (1 - cosine - sine)), axis=1)
    return np.stack((across, down), axis=1)


# Colour jitter and random erasing.


def _jitter(strength: float, seed: int, epochs: np.ndarray, samples: np.ndarray) -> Blend:
    """Saturation, brightness and contrast, in this order, each by a factor uniform in [1 - strength, 1 + strength].

    With s, b, c it is `c b (s x + (1 - s) grey) + (1 - c) b mean(grey)`, since saturation leaves grey as it is.
    """
    draws = uniform(seed, epochs[:, None], samples[:, None], _JITTER, np.arange(3)[None])
    saturation, brightness, contrast = (1 - strength + draws * (2 * strength)).T
    both = contrast * brightness
    parts = both * saturation, both * (1 - saturation), (1 - contrast) * brightness
    return Blend(*(part.astype(np.float32) for part in parts))


def _boxes(probability: float, seed: int, epochs: np.ndarray, samples: np.ndarray, side: int) -> Boxes:
    """Boxes of a share of the area uniform in ERASED_AREA, with a log-uniform aspect ratio, uniformly placed.

    Zhong et al., "Random Erasing", AAAI 2020. Of ten tries the first that is smaller than the image both ways; else
    none is erased.
    """
    erased = uniform(seed, epochs, samples, _ERASE) < probability
    draws = uniform(seed, epochs[:, None], samples[:, None], _ERASE, np.arange(4 * TRIES)[None])
    low, high = ERASED_AREA
    area = side * side * (low + (high - low) * draws[:, 0::4])
    ratio = np.exp(np.log(ERASED_ASPECT) * (2 * draws[:, 1::4] - 1))
    heights, widths = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (heights < side) & (widths < side)
    rows, first = np.arange(len(samples)), fits.argmax(1)
    shapes = np.stack((heights, widths), axis=2)[rows, first]
    anchors = np.floor((side + 1 - shapes) * np.stack((draws[:, 2::4], draws[:, 3::4]), axis=2)[rows, first])
    shapes *= (erased & fits.any(1))[:, None]
    return Boxes(anchors.astype(np.float32), shapes.astype(np.float32))
