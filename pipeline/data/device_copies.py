"""Decoded batches on their way from DALI's memory to tensors of our own on the training device.

    decoder thread     DALI's images ─┐ side stream: copy, cast → images    event ──┐
                       labels → pinned┘                          → labels           │
    training loop                       its stream waits for the event ← ───────────┘ and then uses the tensors

DALI's default executor leaves an output alone while a tensor holds it. But it takes the memory back as soon as the host
drops that tensor, and does not know of kernels that are queued in torch's streams and have yet to read it. So on a GPU
each output is copied, and held until the copy is done. On the CPU nothing is queued: the output itself is handed out.
"""

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


class Mark(Protocol):
    """A point in a queue of copies, such as a CUDA event."""

    def synchronize(self) -> None: ...


class Queue(Protocol):
    """A queue in which a device copies, while the host goes on."""

    def copy(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        """Queues a copy; the source must not change before it is done."""
        ...

    def mark(self) -> Mark:
        """The point after all copies that are queued now."""
        ...

    def hand_over(self, mark: Mark, tensors: tuple[Tensor, ...]) -> None:
        """Lets the caller's stream use these tensors: what it queues from now on comes after `mark`."""
        ...


class SideStream:
    """A CUDA stream for copies, apart from the one that trains."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def copy(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.cuda.stream(self._stream):
            if not source.is_cuda:
                source = source.pin_memory()  # torch keeps it until the copy is done
            return source.to(self._device, dtype, non_blocking=True, copy=True)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def hand_over(self, mark: Mark, tensors: tuple[Tensor, ...]) -> None:
        assert isinstance(mark, torch.cuda.Event)
        current = torch.cuda.current_stream(self._device)
        current.wait_event(mark)
        for tensor in tensors:  # so that their memory, which is the side stream's, is not used again too early
            tensor.record_stream(current)


class Copied(NamedTuple):
    """A batch's tensors on the device; pass them to `DeviceCopies.received` before they are used."""

    images: Tensor
    labels: Tensor
    valid: Tensor
    mark: Mark | None


class DeviceCopies:
    """Copies for one decoder thread.

    Args:
        device: of the tensors.
        dtype: of the images.
        queue: where a GPU copies; None copies nothing that is in place already.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, queue: Queue | None = None) -> None:
        self._dtype = dtype
        self._queue = SideStream(device) if queue is None and device.type == "cuda" else queue
        self._held: tuple[Mark, Tensor] | None = None

    def take(self, images: Tensor, labels: np.ndarray, valid: np.ndarray) -> Copied:
        """Called in the decoder thread with DALI's output, which is held until it has been read."""
        flags, numbers = torch.from_numpy(valid), torch.from_numpy(labels)
        if self._queue is None:  # the cast runs in this thread, ahead of the loop
            return Copied(images.to(self._dtype), numbers, flags, None)
        self.release()
        copied = (
            self._queue.copy(images, self._dtype),
            self._queue.copy(numbers, numbers.dtype),
            self._queue.copy(flags, flags.dtype),
        )
        mark = self._queue.mark()
        self._held = (mark, images)
        return Copied(*copied, mark)

    def release(self) -> None:
        """Gives the last output back to DALI, once it has been read."""
        if self._held is not None:
            self._held[0].synchronize()
            self._held = None

    def received(self, copied: Copied) -> Copied:
        """Called in the training loop's thread: its stream waits for the copies."""
        if self._queue is not None and copied.mark is not None:
            self._queue.hand_over(copied.mark, copied[:3])
        return copied
