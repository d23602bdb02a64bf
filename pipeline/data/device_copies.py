"""Decoded batches on their way from DALI's memory to tensors of our own on the training device.

    decoder thread     DALI's images ─────┐ side stream: copy, cast → images  ─┐
                       labels → pinned ───┘                         → labels  ─┤ event
    training loop      its stream waits for the event ← ───────────────────────┘ and then uses the tensors

DALI's dynamic executor leaves an output alone while a tensor holds it. But it takes the memory back as soon as the host
drops that tensor, and does not know of kernels that wait in torch's streams and have yet to read it. So on a GPU each
output is copied, and held until the copy is done. On the CPU nothing waits: the output itself is handed out.
"""

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


class Mark(Protocol):
    """A point in a queue of copies, such as a CUDA event."""

    def synchronize(self) -> None:
        """The host waits until all copies before this point are done."""
        ...


class Queue(Protocol):
    """A queue in which a device copies while the host goes on."""

    def copy(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        """Queues a copy within the device; `source` must stay as it is until the copy is done."""
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
        """Called in the decoder thread with an output of DALI that is ready; it is held until it has been read."""
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
