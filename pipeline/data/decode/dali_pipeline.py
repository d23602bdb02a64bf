# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# DALI makes its names and overloads at run time, so its stubs lack or misstate these.
"""The DALI pipeline: encoded images and windows → decoded, cropped, resized, changed, flipped, normalised images.

One graph serves the GPU (`mixed` decoding, of the window only) and the CPU. From DALI's memory a batch goes to tensors
of our own (`DeviceCopies`):

    decoder thread     DALI's images ─────┐ side stream: copy, cast → images  ─┐
                       labels → pinned ───┘                         → labels  ─┤ event
    training loop      its stream waits for the event ← ───────────────────────┘ and then uses the tensors

Its dynamic executor leaves an output alone while a tensor holds it. But it takes the memory back as soon as the host
drops that tensor, and does not know of kernels that wait in torch's streams and have yet to read it. So on a GPU each
output is copied, and held until the copy is done. On the CPU nothing waits: the output itself is handed out.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def
from torch import Tensor

from pipeline.config import DataConfig
from pipeline.data.decode.augment import Windows
from pipeline.data.decode.dali_ops import changed, forms
from pipeline.ranks.cores import cores_per_rank

MEAN = (123.675, 116.28, 103.53)  # of ImageNet, in 8-bit levels
STD = (58.395, 57.12, 57.375)


class ImageViews(NamedTuple):
    """What the network sees of each image of a batch."""

    windows: Windows
    changes: list[np.ndarray]
    """As `draw_changes` gives them; empty where nothing is on, as in an evaluation."""


Fed = tuple[list[np.ndarray], ImageViews]


class Graph:
    """A built DALI pipeline. After an image that DALI cannot decode it is broken; a new one must be built.

    Args:
        data: threads and other decoding settings.
        device: where images come out.
        feed: called ahead of `run`, gives the encoded images and the views of the next batch; `StopIteration` ends it.
    """

    def __init__(
        self,
        data: DataConfig,
        device: torch.device,
        feed: Callable[[], Fed],
        *,
        batch_size: int,
        ahead: int,
    ) -> None:
        def source() -> list:
            encoded, (windows, changes) = feed()
            return [encoded, *windows, *changes]

        self._pipeline = _pipeline(data, device, source, batch_size, ahead)

    def run(self) -> Tensor:
        """The next batch: `(n, 3, H, W)` float32 in channels-last memory.

        The caller may keep it. On a GPU it must not drop it before it has been read: see `DeviceCopies`.

        Raises:
            RuntimeError: DALI could not process one of the batches fed so far.
        """
        (images,) = self._pipeline.run()
        # No copy: the dynamic executor gives this buffer away and uses another for the next batch.
        return torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)


def _pipeline(data: DataConfig, device: torch.device, source: Callable[[], list], batch_size: int, ahead: int):
    on_gpu = device.type == "cuda"
    inputs = [(types.UINT8, 1), (types.INT32, 1), (types.INT32, 1), (types.INT32, 0), (types.FLOAT, 1), *forms(data)]

    @pipeline_def(
        batch_size=batch_size,
        num_threads=data.threads or cores_per_rank(),
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=ahead,
        exec_dynamic=True,
        enable_conditionals=bool(data.aa),
    )
    def graph():
        encoded, anchors, shapes, flips, sides, *changes = fn.external_source(
            source=source,
            num_outputs=len(inputs),
            batch=True,
            no_copy=not on_gpu,  # the feeder keeps a batch until it comes out; a GPU may still be copying it then
            dtype=[dtype for dtype, _ in inputs],
            ndim=[ndim for _, ndim in inputs],
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
        images = changed(data, images, iter(changes), on_gpu=on_gpu, mean=MEAN)
        return fn.crop_mirror_normalize(
            images, mirror=flips, dtype=types.FLOAT, output_layout="HWC", mean=list(MEAN), std=list(STD)
        )

    pipeline = graph()
    pipeline.build()
    return pipeline


def undecodable(data: DataConfig, device: torch.device, encoded: Sequence[np.ndarray], views: ImageViews) -> list[int]:
    """Which of a batch's images DALI cannot decode, tried one by one: its error does not name them."""
    culprits: list[int] = []
    slots = iter(range(len(encoded)))
    tried: list[int] = []

    def feed() -> Fed:
        slot = next(slots)
        tried.append(slot)
        return [encoded[slot]], ImageViews(Windows(*(part[slot : slot + 1] for part in views.windows)), [])

    data = data.plain
    single = Graph(data, device, feed, batch_size=1, ahead=1)
    while True:
        try:
            single.run()
        except StopIteration:
            return culprits
        except RuntimeError:
            culprits.append(tried[-1])
            single = Graph(data, device, feed, batch_size=1, ahead=1)


class Mark(Protocol):
    """A point in a queue of copies, such as a CUDA event."""

    def synchronize(self) -> None:
        """The host waits until all copies before this point are done."""
        ...


class Queue(Protocol):
    """A queue in which a device copies while the host goes on."""

    def copy(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        """Queues a copy to the device or within it; `source` must stay as it is until the copy is done."""
        ...

    def send(self, array: np.ndarray) -> Tensor:
        """Queues a copy from the host to the device; the caller may change `array` at once."""
        ...

    def mark(self) -> Mark:
        """The point after all copies that are queued now."""
        ...

    def hand_over(self, mark: Mark, tensors: tuple[Tensor, ...]) -> None:
        """Lets the caller's stream use `tensors`: what it queues from now on runs after `mark`."""
        ...


class SideStream:
    """A CUDA stream for copies, beside the one that trains."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def copy(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.cuda.stream(self._stream):
            if source.device.type == "cpu":  # frames of events: their cast is the device's work
                source = source.pin_memory().to(self._device, non_blocking=True)
            return source.to(self._device, dtype, non_blocking=True, copy=True)

    def send(self, array: np.ndarray) -> Tensor:
        with torch.cuda.stream(self._stream):
            pinned = torch.from_numpy(array).pin_memory()  # torch does not use it again before the copy is done
            return pinned.to(self._device, non_blocking=True)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def hand_over(self, mark: Mark, tensors: tuple[Tensor, ...]) -> None:
        assert isinstance(mark, torch.cuda.Event)
        current = torch.cuda.current_stream(self._device)
        current.wait_event(mark)
        for tensor in tensors:  # their memory is the side stream's, which must not use it again too early
            tensor.record_stream(current)


class Copied(NamedTuple):
    """A batch's tensors on the device; pass them to `DeviceCopies.received` before they are used."""

    images: Tensor
    labels: Tensor
    valid: Tensor
    mark: Mark | None


class DeviceCopies:
    """The copies of one decoder thread.

    Args:
        device: of the tensors.
        dtype: of the images.
        queue: where the device copies; None takes a side stream on a GPU, and copies nothing on the CPU.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, queue: Queue | None = None) -> None:
        self._dtype = dtype
        self._queue = SideStream(device) if queue is None and device.type == "cuda" else queue
        self._held: tuple[Mark, Tensor] | None = None

    def take(self, images: Tensor, labels: np.ndarray, valid: np.ndarray) -> Copied:
        """Called in the decoder thread with an output of a decoder that is ready; held until it has been read."""
        queue = self._queue
        if queue is None:  # the cast runs in this thread, ahead of the loop
            return Copied(images.to(self._dtype), torch.from_numpy(labels), torch.from_numpy(valid), None)
        self.release()
        tensors = queue.copy(images, self._dtype), queue.send(labels), queue.send(valid)
        mark = queue.mark()
        self._held = (mark, images)
        return Copied(*tensors, mark)

    def release(self) -> None:
        """Gives the last output back to DALI, once it has been read."""
        if self._held is not None:
            self._held[0].synchronize()
            self._held = None

    def received(self, copied: Copied) -> tuple[Tensor, Tensor, Tensor]:
        """Called in the training loop's thread: its stream waits for the copies. Images, labels, valid."""
        if self._queue is not None and copied.mark is not None:
            self._queue.hand_over(copied.mark, copied[:3])
        return copied[:3]
