"""scikit-learn's handwritten digits: 1,797 real 8x8 greyscale images that need no download."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.collection import Split, SplitBuilder
from data_prep.plan import shuffled
from data_prep.sources.readers import MemoryReader

SHARD_BYTES = 512 << 10
"""Small enough for several shards, so that their order matters as it does with a large data set."""
_VAL_RATIO = 0.2
_CLASSES = tuple("0123456789")


class Digits:
    """The digits as lossless PNG files, a fifth of every class held out as val, drawn by the seed."""

    description = "scikit-learn's digits"

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def fingerprint(self) -> list:
        return ["digits"]

    def index(self, work: Path, say: object) -> list[Split]:
        from sklearn.datasets import load_digits  # a second of imports that no other source needs

        bunch = load_digits()
        labels = np.asarray(bunch.target)  # pyright: ignore[reportAttributeAccessIssue]
        pixels = np.rint(np.asarray(bunch.images) * (255 / 16)).astype(np.uint8)  # pyright: ignore[reportAttributeAccessIssue]
        files = [_png(image) for image in pixels]
        starts = np.cumsum([0, *map(len, files)])
        reader = MemoryReader(b"".join(files))
        builders = {name: SplitBuilder(name, [reader]) for name in ("train", "val")}
        for label in range(len(_CLASSES)):
            numbers = np.flatnonzero(labels == label)
            drawn = numbers[shuffled(len(numbers), self._seed)]
            num_val = round(_VAL_RATIO * len(drawn))
            for place, number in enumerate(drawn):
                builders["val" if place < num_val else "train"].add(
                    name=f"{label}/{number:04d}.png",
                    label=str(label),
                    place=0,
                    offset=int(starts[number]),
                    length=len(files[number]),
                )
        return [builder.build(_CLASSES) for builder in builders.values()]


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()
