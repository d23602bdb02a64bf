"""Reads and decodes micro-batches ahead of the training loop.

    reader thread: numbers → bytes, views → decoder thread: DALI (its own threads) → Batch → the training loop

Recordings of events are counted by NumPy where images are decoded by DALI.

Threads, not processes: reading and decoding release the GIL, a killed rank leaves no orphans, and a resume starts no
processes.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.config import DataConfig
from pipeline.data.background import Background
from pipeline.data.decode.dali_pipeline import Copied, DeviceCopies
from pipeline.data.decode.kinds import Decoder, Kind
from pipeline.data.remote import ClosedError
from pipeline.data.samples import UNDECODABLE, BadSamples, Samples

GRAPH_AHEAD = 3  # batches inside DALI; with fewer its threads have no work between two batches


class Batch(NamedTuple):
    images: Tensor
    """`(m, 3, H, W)`, normalised; of event data `(T, m, 2, H, W)`, counts. Channels-last, on the device."""
    labels: Tensor
    """`(m,)` int64, on the device. Of a mixed image, the class with the larger share of it."""
    valid: Tensor
    """`(m,)` bool; False pads an evaluation's last batch."""
    position: int
    """Stream position of the first sample."""
    mixed: Tensor | None = None
    """`(m, K)` float32: the classes' shares of each image; None where images are not mixed."""

    @property
    def targets(self) -> Tensor:
        """What the loss compares with: `mixed`, or the labels."""
        return self.labels if self.mixed is None else self.mixed


class Request(NamedTuple):
    """A micro-batch before decoding."""

    index: int
    """The index from which `prepare` made it."""
    numbers: np.ndarray
    encoded: list[np.ndarray]
    views: Any
    """What its kind of samples made: see `kinds.py`."""
    labels: np.ndarray
    valid: np.ndarray
    position: int
    bad: list[tuple[str, str, str]]
    """Name, reason and what was done instead, for each sample that could not be used."""


class Stream:
    """Turns `prepare(index)` into batches for each index that `run` is given.

    Args:
        data, device: see `Graph`.
        kind: of the samples.
        samples: a sample that does not decode is marked bad here, so that `prepare` replaces it.
        prepare: makes the request of an index; called in the reader thread.
        bad: counts bad samples when their batches are handed out.
        dtype: of the images.
    """

    def __init__(
        self,
        data: DataConfig,
        kind: Kind,
        device: torch.device,
        samples: Samples,
        prepare: Callable[[int], Request],
        bad: BadSamples,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._data, self._kind, self._device = data, kind, device
        self._samples, self._prepare, self._bad, self._dtype = samples, prepare, bad, dtype
        self._reader = Background(1, name="shard-reader")
        self._decoder: _DecoderThread | None = None
        self.wait_s = 0.0
        """Seconds that `run` waited for a finished batch."""

    @property
    def queue_depth(self) -> int:
        """Finished batches that wait to be taken."""
        return self._decoder.depth if self._decoder is not None else 0

    def run(self, indices: Sequence[int]) -> Iterator[Batch]:
        """The batches of `indices`, in order. One run at a time: a new one ends the one before."""
        if self._decoder is not None:
            self._decoder.close()
        decoder = self._decoder = _DecoderThread(
            self._data, self._kind, self._device, self._samples, self._prepare, self._reader, iter(indices), self._dtype
        )
        for _ in indices:
            began = time.monotonic()
            batch, bad = decoder.next()
            self.wait_s += time.monotonic() - began
            decoder.make_room()  # not timed: it wakes the decoder, which may take this core or the interpreter first
            for name, reason, instead in bad:
                self._bad.met(name, reason, instead=instead)
            yield batch

    def close(self) -> None:
        """Ends the threads. Waits at most for the read that is under way."""
        self._reader.close(wait=False)
        if self._decoder is not None:
            self._decoder.close()
        self._reader.close(wait=True)


class _DecoderThread:
    """The thread that feeds the kind's decoder and collects from it, for one run."""

    def __init__(
        self,
        data: DataConfig,
        kind: Kind,
        device: torch.device,
        samples: Samples,
        prepare: Callable[[int], Request],
        reader: Background,
        indices: Iterator[int],
        dtype: torch.dtype,
    ) -> None:
        self._data, self._kind, self._samples = data, kind, samples
        self._device, self._copies = device, DeviceCopies(device, dtype)
        self._prepare, self._reader, self._indices = prepare, reader, indices
        self._ahead = min(data.prefetch, GRAPH_AHEAD)
        self._reading: deque[Future[Request]] = deque()
        self._again: deque[Request] = deque()
        self._fed: deque[Request] = deque()
        self._lost: list[Request] = []
        self._room = threading.Semaphore(data.prefetch)
        self._stopped = False
        self._done: SimpleQueue[tuple[Copied, Request] | BaseException] = SimpleQueue()
        # A daemon, so that a program that crashes without `close` does not wait for data.
        self._thread = threading.Thread(target=self._work, name="decoder", daemon=True)
        self._thread.start()

    def next(self) -> tuple[Batch, list]:
        """The next batch, whose tensors the caller's stream may use, and its bad samples."""
        item = self._done.get()
        if isinstance(item, BaseException):
            raise item
        copied, request = item
        images, labels, valid = self._copies.received(copied)
        return Batch(images, labels, valid, request.position), request.bad

    @property
    def depth(self) -> int:
        return self._done.qsize()

    def make_room(self) -> None:
        """Lets the decoder make one more batch; call it after each `next`."""
        self._room.release()

    def close(self) -> None:
        self._stopped = True
        self._room.release()
        self._thread.join()

    def _work(self) -> None:
        try:
            if self._device.index:  # a new thread has the first GPU, and would put a context there
                torch.cuda.set_device(self._device)
            for _ in range(2 * self._data.prefetch):
                self._read_on()
            decoder = self._decoder()
            while self._fed or self._again or self._reading:
                self._room.acquire()
                if self._stopped:
                    return
                try:
                    images = decoder.run()
                except RuntimeError as error:
                    self._repair(error)
                    decoder = self._decoder()
                    self._room.release()
                    continue
                request = self._fed.popleft()
                self._done.put((self._copies.take(images, request.labels, request.valid), request))
        except CancelledError:  # closed while it waited for a read
            pass
        except BaseException as error:  # the training loop raises it, in its own thread
            self._done.put(error)
        finally:
            self._done.put(ClosedError("the loader was closed"))  # so that a waiting `next` ends
            self._copies.release()

    def _decoder(self) -> Decoder:
        return self._kind.decoder(self._feed, ahead=self._ahead)

    def _read_on(self) -> None:
        index = next(self._indices, None)
        if index is not None:
            self._reading.append(self._reader.submit(self._prepare, index))

    def _feed(self) -> tuple[list[np.ndarray], Any]:
        if self._again:
            request = self._again.popleft()
        elif self._reading and not self._stopped:
            request = self._reading.popleft().result()
            self._read_on()
        else:
            raise StopIteration
        self._fed.append(request)
        return request.encoded, request.views

    def _repair(self, error: RuntimeError) -> None:
        """Finds the sample that did not decode, marks it bad, and prepares all batches that DALI lost again."""
        for request in self._fed:
            culprits = self._kind.undecodable(request.encoded, request.views)
            if culprits:
                self._samples.bad.update(dict.fromkeys(request.numbers[culprits].tolist(), UNDECODABLE))
                break
        else:
            raise error
        # Both queues: batches that an earlier failure lost may not have been fed again yet.
        # Kept until the next failure: threads of the broken pipeline may still read these bytes.
        self._lost = [*self._fed, *self._again]
        self._fed.clear()
        self._again = deque(self._reader.submit(self._prepare, request.index).result() for request in self._lost)
