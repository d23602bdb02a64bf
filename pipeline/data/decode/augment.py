"""Crop, flip and size of images. A sample's crop and flip depend only on (seed, epoch, sample), its size on the epoch.

Random-resized crop as in Inception and torchvision: an area uniform in [area_min, 1] of the image, an aspect ratio
log-uniform in [1/aspect, aspect], placed uniformly; after ten tries that do not fit, the largest central crop.
"""

from typing import NamedTuple

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.order import mix

TRIES = 10
_CROP, _FLIP = 2, 3  # hash words that keep these draws independent of those of the order


class Windows(NamedTuple):
    """The parts of `n` images that the network sees, in pixels. Arrays in the form that DALI takes."""

    anchors: np.ndarray
    """`(n, 2)` int32: top, left."""
    shapes: np.ndarray
    """`(n, 2)` int32: height, width."""
    flips: np.ndarray
    """`(n,)` int32: 1 mirrors left and right."""
    sides: np.ndarray
    """`(n, 2)` float32: height and width that each part is resized to."""


def uniform(*words: int | np.ndarray) -> np.ndarray:
    """Uniform in [0, 1), 53 bits, from a hash of the words."""
    return (mix(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def random_windows(
    seed: int,
    epochs: np.ndarray,
    samples: np.ndarray,
    sizes: np.ndarray,
    *,
    area_min: float,
    aspect: float,
    flip: bool,
    image_size: int,
) -> Windows:
    """Training windows of samples `(n,)` whose sizes `(n, 2)` are heights and widths, to be resized to `image_size`."""
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    draws = uniform(seed, epochs[:, None], samples[:, None], _CROP, np.arange(4 * TRIES)[None])
    area = height * width * (area_min + (1 - area_min) * draws[:, 0::4])
    ratio = np.exp(np.log(aspect) * (2 * draws[:, 1::4] - 1))
    crop_width, crop_height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (crop_width >= 1) & (crop_width <= width) & (crop_height >= 1) & (crop_height <= height)
    top = np.floor((height - crop_height + 1) * draws[:, 2::4])
    left = np.floor((width - crop_width + 1) * draws[:, 3::4])
    first = fits.argmax(1)
    rows = np.arange(len(samples))
    boxes = np.stack((top, left, crop_height, crop_width), axis=2)[rows, first]
    boxes = np.where(fits.any(1)[:, None], boxes, _largest_central(sizes, aspect)).astype(np.int32)
    flips = (uniform(seed, epochs, samples, _FLIP) < 0.5) & flip
    anchors, shapes = (np.ascontiguousarray(part) for part in (boxes[:, :2], boxes[:, 2:]))
    return Windows(anchors, shapes, flips.astype(np.int32), _sides(len(samples), image_size))


def _largest_central(sizes: np.ndarray, aspect: float) -> np.ndarray:
    """`(n, 4)` top, left, height, width of the largest central crop whose aspect ratio is allowed."""
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    crop_height = np.maximum(1, np.minimum(height, np.rint(width * aspect)))
    crop_width = np.maximum(1, np.minimum(width, np.rint(height * aspect)))
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return np.stack((top, left, crop_height, crop_width), axis=1)


def central_windows(sizes: np.ndarray, *, image_size: int, resize: int) -> Windows:
    """Evaluation windows: the central `image_size` square of an image whose shorter side is resized to `resize`."""
    side = np.rint(sizes.min(1) * (image_size / resize)).clip(1).astype(np.int32)
    shapes = np.stack((side, side), axis=1)
    anchors, flips = ((sizes - shapes) // 2).astype(np.int32), np.zeros(len(sizes), np.int32)
    return Windows(anchors, shapes, flips, _sides(len(sizes), image_size))


def _sides(count: int, image_size: int) -> np.ndarray:
    return np.full((count, 2), image_size, dtype=np.float32)


def image_size_at(data: DataConfig, epoch: int) -> int:
    """Side in pixels of the images of a step that begins in `epoch`; epochs count from 0.

    It grows linearly from `image_size_start` to `image_size` over the epochs of `image_size_ramp`, in multiples of
    `image_size_step`. It depends on the epoch alone: the same on every rank, and after a resume.
    """
    if not data.image_size_start:
        return data.image_size
    begin, end = data.image_size_ramp
    share = min(1.0, max(0.0, (epoch - begin) / (end - begin)))
    side = data.image_size_start + share * (data.image_size - data.image_size_start)
    step = data.image_size_step
    return data.image_size if share == 1 else max(data.image_size_start, int(side // step * step))
