"""What differs between images and recordings of events on the way to a batch; all else of the loader is the same."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.config import DataConfig
from pipeline.data.background import Background
from pipeline.data.decode import dali_pipeline, event_frames
from pipeline.data.decode.augment import central_windows, random_windows
from pipeline.data.decode.auto_augment import draw_changes
from pipeline.data.decode.dali_pipeline import Graph, ImageViews
from pipeline.data.decode.event_frames import FrameForm, FrameMaker, Views
from pipeline.data.manifest import EVENTS, Manifest
from pipeline.ranks.cores import cores_per_rank

Feed = Callable[[], tuple[list[np.ndarray], Any]]
"""Gives the encoded samples and the views of the next batch; `StopIteration` ends it."""


class Decoder(Protocol):
    def run(self) -> Tensor:
        """The next batch's images or frames; `RuntimeError` where a sample of those fed so far does not decode, after
        which a new decoder must be made.
        """
        ...


class Kind(Protocol):
    """A kind of samples. A view says which part of a sample the network sees."""

    def random_views(self, epochs: np.ndarray, numbers: np.ndarray, records: np.ndarray, image_size: int) -> Any:
        """The views of training samples: a pure function of (seed, epoch, number) and the size."""
        ...

    def whole_views(self, records: np.ndarray) -> Any:
        """The views of an evaluation."""
        ...

    def decoder(self, feed: Feed, *, ahead: int) -> Decoder:
        """A decoder that may take up to `ahead` batches from `feed` before one comes out."""
        ...

    def undecodable(self, encoded: Sequence[np.ndarray], views: Any) -> list[int]:
        """Which samples of a batch do not decode."""
        ...

    def close(self) -> None: ...


class Images:
    """JPEG, PNG and other files, decoded by DALI to `(n, 3, S, S)` float32."""

    def __init__(self, data: DataConfig, seed: int, device: torch.device) -> None:
        self._data, self._seed, self._device = data, seed, device

    def random_views(self, epochs: np.ndarray, numbers: np.ndarray, records: np.ndarray, image_size: int) -> ImageViews:
        windows = random_windows(
            self._seed,
            epochs,
            numbers,
            _sizes(records),
            area_min=self._data.crop_area_min,
            aspect=self._data.crop_aspect,
            flip=self._data.flip,
            image_size=image_size,
        )
        return ImageViews(windows, draw_changes(self._data, self._seed, epochs, numbers, image_size))

    def whole_views(self, records: np.ndarray) -> ImageViews:
        size = self._data.image_size
        windows = central_windows(_sizes(records), image_size=size, resize=self._data.eval_resize or size)
        return ImageViews(windows, [])

    def decoder(self, feed: Feed, *, ahead: int) -> Graph:
        return Graph(self._data, self._device, feed, batch_size=self._data.micro_batch, ahead=ahead)

    def undecodable(self, encoded: Sequence[np.ndarray], views: ImageViews) -> list[int]:
        return dali_pipeline.undecodable(self._data, self._device, encoded, views)

    def close(self) -> None:
        pass


class Recordings:
    """Recordings of events, made into `(T, n, 2, S, S)` int16 counts by NumPy in threads of this process."""

    def __init__(self, data: DataConfig, seed: int, T: int) -> None:
        self._data, self._seed = data, seed
        self._form = FrameForm(T, data.image_size, data.event_frames)
        threads = data.threads or cores_per_rank()
        self._threads = Background(threads, name="frames") if threads > 1 else None

    def random_views(self, epochs: np.ndarray, numbers: np.ndarray, records: np.ndarray, image_size: int) -> Views:
        data = self._data
        return event_frames.random_views(
            self._seed, epochs, numbers, shift=data.event_shift, flip=data.flip, drop=data.event_drop
        )

    def whole_views(self, records: np.ndarray) -> Views:
        return event_frames.whole_views(len(records))

    def decoder(self, feed: Feed, *, ahead: int) -> FrameMaker:
        return FrameMaker(self._form, feed, self._threads)

    def undecodable(self, encoded: Sequence[np.ndarray], views: Views) -> list[int]:
        return event_frames.undecodable(encoded)

    def close(self) -> None:
        if self._threads is not None:
            self._threads.close(wait=False)


def kind_of(manifest: Manifest, data: DataConfig, *, seed: int, device: torch.device, T: int | None) -> Kind:
    """The kind of a set's samples.

    Args:
        T: frames of a recording of events; images have none.
    """
    if manifest.kind != EVENTS:
        return Images(data, seed, device)
    if T is None:
        raise TypeError(f"{data.path} holds event recordings; give the loader T, the number of frames of one")
    return Recordings(data, seed, T)


def _sizes(records: np.ndarray) -> np.ndarray:
    """`(n, 2)` int64 heights and widths."""
    return np.stack((records["height"], records["width"]), axis=1).astype(np.int64)
