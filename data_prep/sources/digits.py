"""scikit-learn's handwritten digits: 1,797 real 8x8 greyscale images that need no download."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.collection import Split, SplitBuilder
from data_prep.plan import shuffled
from data_prep.sources.readers import MemoryReader

SHARD_BYTES = 512 << 10
"""Small enough for several shards, so that their order matters as it does with a large data set."""
CLASSES = tuple("0123456789")
_VAL_RATIO = 0.2


class Digits:
    """The digits as lossless PNG files, a fifth of every class held out as val, drawn by the seed."""

    description = "scikit-learn's digits"

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def fingerprint(self) -> list:
        return ["digits"]

    def index(self, work: Path, say: object) -> list[Split]:
        pixels, labels = load()
        files = [_png(np.rint(image * (255 / 16)).astype(np.uint8)) for image in pixels]
        starts = np.cumsum([0, *map(len, files)])
        reader = MemoryReader(b"".join(files))
        builders = {name: SplitBuilder(name, [reader]) for name in ("train", "val")}
        for split, number in held_out(labels, self._seed):
            label = str(labels[number])
            name, offset = f"{label}/{number:04d}.png", int(starts[number])
            builders[split].add(name=name, label=label, place=0, offset=offset, length=len(files[number]))
        return [builder.build(CLASSES) for builder in builders.values()]


def load() -> tuple[np.ndarray, np.ndarray]:
    """All digits, `(1797, 8, 8)` uint8 from 0 to 16, and their labels."""
    from sklearn.datasets import load_digits  # a second of imports that no other source needs

    bunch = load_digits()
    pixels, labels = np.asarray(bunch.images), np.asarray(bunch.target)  # pyright: ignore[reportAttributeAccessIssue]
    return pixels.astype(np.uint8), labels


def held_out(labels: np.ndarray, seed: int) -> Iterator[tuple[str, int]]:
    """The split and the number of every digit: a fifth of each class is val, drawn by the seed."""
    for label in range(len(CLASSES)):
        numbers = np.flatnonzero(labels == label)
        drawn = numbers[shuffled(len(numbers), seed)]
        num_val = round(_VAL_RATIO * len(drawn))
        for place, number in enumerate(drawn):
            yield "val" if place < num_val else "train", int(number)


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()
