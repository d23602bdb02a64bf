# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# DALI makes its names and overloads at run time, so its stubs lack or misstate these.
"""The operations of decode/auto_augment.py in DALI's graph, the same on the GPU and the CPU.

DALI splits a batch by each condition, so an image goes through its own operation alone. What an operation does to it
comes from arrays: none of DALI's random generators is used. Pixels outside an image are grey (128), and the nearest
pixel is taken, as torchvision does by default: on the CPU interpolation costs DALI eight times as much.
"""

from collections.abc import Iterator

import numpy as np
from nvidia.dali import fn, math, types

from pipeline.config import DataConfig
from pipeline.data.decode.auto_augment import (
    AUTOCONTRAST,
    BLEND,
    BRIGHTNESS,
    EQUALIZE,
    POSTERIZE,
    SHARPNESS,
    SOLARIZE,
    SOLARIZE_ADD,
    WARP,
    Blend,
    Boxes,
    Slot,
    num_slots,
)

_FORMS = {
    Slot: Slot(
        (types.INT32, 0), (types.FLOAT, 2), (types.FLOAT, 0), (types.FLOAT, 0), (types.FLOAT, 0), (types.UINT8, 0)
    ),
    Blend: Blend((types.FLOAT, 0), (types.FLOAT, 0), (types.FLOAT, 0)),
    Boxes: Boxes((types.FLOAT, 1), (types.FLOAT, 1)),
}
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13  # Pillow's filter SMOOTH
_SAME = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=np.float32)
OUTSIDE = 128


def forms(data: DataConfig) -> list[tuple[object, int]]:
    """DALI's type and number of dimensions of each array of `draw_changes`."""
    parts = [_FORMS[Slot]] * num_slots(data)
    parts += [_FORMS[Blend]] * bool(data.color_jitter) + [_FORMS[Boxes]] * bool(data.reprob)
    return [form for part in parts for form in part]


def changed(data: DataConfig, images, arrays: Iterator, *, on_gpu: bool, mean: tuple[float, ...]):
    """Images (H, W, 3) after all that is on; `arrays` are the nodes of `draw_changes`.

    Erased pixels get `mean`, rounded. Colour jitter makes them float32; else they stay uint8.
    """
    for _ in range(num_slots(data)):
        images = _in_slot(images, *_taken(Slot, arrays), on_gpu)
    if data.color_jitter:
        images = math.clamp(_blend(images, *_taken(Blend, arrays), on_gpu), 0.0, 255.0)
    if data.reprob:
        boxes = _taken(Boxes, arrays)
        images = fn.erase(
            images, anchor=boxes.anchors, shape=boxes.shapes, axis_names="HW", fill_value=[round(part) for part in mean]
        )
    return images


def _taken(kind: type, arrays: Iterator):
    return kind(*(next(arrays) for _ in kind._fields))


def _in_slot(images, kind, matrix, of_image, of_grey, of_mean, level, on_gpu: bool):
    """One operation on each image; DALI turns the conditions into a split of the batch."""
    if kind == WARP:
        images = fn.warp_affine(images, matrix=matrix, fill_value=OUTSIDE, interp_type=types.INTERP_NN)
    elif kind == BLEND:
        images = fn.cast(_blend(images, of_image, of_grey, of_mean, on_gpu), dtype=types.UINT8)
    elif kind == BRIGHTNESS:
        images = fn.brightness_contrast(images, brightness=of_image)
    elif kind == SHARPNESS:
        kernel = (1 - of_image) * types.Constant(_SMOOTH) + of_image * types.Constant(_SAME)
        images = fn.filter(images, _beside(kernel, on_gpu))
    elif kind == POSTERIZE:
        images = images & _beside(level, on_gpu)
    elif kind == SOLARIZE:
        images = images ^ ((images >= _beside(level, on_gpu)) * types.Constant(255, dtype=types.UINT8))
    elif kind == SOLARIZE_ADD:
        images = images + (images < 128) * _beside(level, on_gpu)
    elif kind == AUTOCONTRAST:
        lowest = fn.reductions.min(images, axis_names="HW", keep_dims=True)
        highest = fn.reductions.max(images, axis_names="HW", keep_dims=True)
        flat = lowest == highest  # a channel of one level stays as it is
        scale = 255.0 / ((highest - lowest) * (flat ^ True) + flat * types.Constant(255, dtype=types.UINT8))
        images = fn.cast((images - lowest * (flat ^ True)) * scale, dtype=types.UINT8)
    elif kind == EQUALIZE:
        images = fn.equalize(images)
    return images


def _blend(images, of_image, of_grey, of_mean, on_gpu: bool):
    """`of_image x + of_grey grey(x) + of_mean mean(grey(x))` in float32; grey has the weights 0.299, 0.587, 0.114."""
    grey = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
    wide = fn.color_space_conversion(grey, image_type=types.GRAY, output_type=types.RGB)
    weighted = images * _beside(of_image, on_gpu) + wide * _beside(of_grey, on_gpu)
    return weighted + fn.reductions.mean(grey) * _beside(of_mean, on_gpu)


def _beside(node, on_gpu: bool):
    """`node` where the images are."""
    return node.gpu() if on_gpu else node
