# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# DALI makes its names and overloads at run time, so its stubs lack or misstate these.
"""The DALI pipeline: encoded images and windows → decoded, cropped, resized, flipped, normalised images.

One graph serves the GPU (`mixed` decoding, of the window only) and the CPU.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def
from torch import Tensor

from pipeline.config import DataConfig
from pipeline.data.augment import Windows
from pipeline.ranks.cores import cores_per_rank

MEAN = (123.675, 116.28, 103.53)  # of ImageNet, in 8-bit levels
STD = (58.395, 57.12, 57.375)


class Graph:
    """A built DALI pipeline. After an image that DALI cannot decode it is broken; a new one must be built.

    Args:
        data: threads and other decoding settings.
        device: where images come out.
        feed: called ahead of `run`, gives the encoded images and windows of the next batch; `StopIteration` ends it.
    """

    def __init__(
        self,
        data: DataConfig,
        device: torch.device,
        feed: Callable[[], tuple[list[np.ndarray], Windows]],
        *,
        batch_size: int,
        ahead: int,
    ) -> None:
        def source() -> list:
            encoded, windows = feed()
            return [encoded, *windows]

        self._pipeline = _pipeline(data, device, source, batch_size, ahead)

    def run(self) -> Tensor:
        """The next batch: `(n, 3, H, W)` float32 in channels-last memory.

        The caller may keep it. On a GPU it must not drop it before it has been read; see device_copies.py.

        Raises:
            RuntimeError: DALI could not process one of the batches fed so far.
        """
        (images,) = self._pipeline.run()
        # No copy: the dynamic executor gives this buffer away and uses another for the next batch.
        return torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)


def _pipeline(data: DataConfig, device: torch.device, source: Callable[[], list], batch_size: int, ahead: int):
    on_gpu = device.type == "cuda"

    @pipeline_def(
        batch_size=batch_size,
        num_threads=data.threads or cores_per_rank(),
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=ahead,
        exec_dynamic=True,
    )
    def graph():
        encoded, anchors, shapes, flips, sides = fn.external_source(
            source=source,
            num_outputs=5,
            batch=True,
            no_copy=not on_gpu,  # the feeder keeps a batch until it comes out; a GPU may still be copying it then
            dtype=[types.UINT8, types.INT32, types.INT32, types.INT32, types.FLOAT],
            ndim=[1, 1, 1, 0, 1],
        )
        images = fn.decoders.image_slice(
            encoded,
            anchors,
            shapes,
            axes=[0, 1],
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            jpeg_fancy_upsampling=True,  # else GPU and CPU decode to different pixels
            hw_decoder_load=data.hw_decoder_load,
        )
        images = fn.resize(images, size=sides, interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.crop_mirror_normalize(
            images, mirror=flips, dtype=types.FLOAT, output_layout="HWC", mean=list(MEAN), std=list(STD)
        )

    pipeline = graph()
    pipeline.build()
    return pipeline


def undecodable(data: DataConfig, device: torch.device, encoded: Sequence[np.ndarray], windows: Windows) -> list[int]:
    """Which of a batch's images DALI cannot decode, tried one by one: its error does not name them."""
    culprits: list[int] = []
    slots = iter(range(len(encoded)))
    tried: list[int] = []

    def feed() -> tuple[list[np.ndarray], Windows]:
        slot = next(slots)
        tried.append(slot)
        return [encoded[slot]], Windows(*(part[slot : slot + 1] for part in windows))

    single = Graph(data, device, feed, batch_size=1, ahead=1)
    while True:
        try:
            single.run()
        except StopIteration:
            return culprits
        except RuntimeError:
            culprits.append(tried[-1])
            single = Graph(data, device, feed, batch_size=1, ahead=1)
