"""Copies to the device that run late: what the loop gets is whole, though DALI takes its memory back at once.

The CPU has no side stream. In its place stands a queue that copies only when somebody waits for it, as a GPU that is
behind does; and DALI's memory is overwritten as soon as nobody holds it, as DALI's next batch would do.
"""

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from queue import SimpleQueue

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config import DataConfig
from pipeline.data import prefetcher
from pipeline.data.decode.dali_pipeline import DeviceCopies, Mark
from pipeline.data.loader import Batch, Loader, evaluation_batches
from tests.data.test_samples import UNDECODABLE
from tests.support.data_sets import drawn_jpeg, write_set

CPU = torch.device("cpu")
STEPS, PREFETCH, PER_STEP = 4, 4, 3
WAIT_S = 60


class LateQueue:
    """Copies when a mark is waited for, or handed over; until then its tensors hold nothing of use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queued: deque[tuple[Tensor, Tensor]] = deque()
        self._num_queued = self._num_done = 0
        self.num_held = 0
        """Outputs of DALI that somebody still holds."""
        self._batches: SimpleQueue[LateMark] = SimpleQueue()

    def copy(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        memory = source.data  # shares the memory, but not the object whose end gives it back
        self.num_held += 1
        weakref.finalize(source, self._taken_back, memory)
        return self._later(memory, torch.full_like(source, -7, dtype=dtype))

    def send(self, array: np.ndarray) -> Tensor:
        pinned = torch.from_numpy(array.copy())
        return self._later(pinned, torch.zeros_like(pinned))

    def mark(self) -> "LateMark":
        mark = LateMark(self, self._num_queued)
        self._batches.put(mark)
        return mark

    def hand_over(self, mark: Mark, tensors: tuple[Tensor, ...]) -> None:
        mark.synchronize()

    def wait_for(self, num_batches: int) -> None:
        """Returns when so many more batches were queued."""
        for _ in range(num_batches):
            self._batches.get(timeout=WAIT_S)

    def run(self, until: int) -> None:
        with self._lock:  # the decoder and the loop wait for marks
            while self._num_done < until:
                source, to = self._queued.popleft()
                to.copy_(source)
                self._num_done += 1

    def _later(self, source: Tensor, to: Tensor) -> Tensor:
        self._queued.append((source, to))
        self._num_queued += 1
        return to

    def _taken_back(self, memory: Tensor) -> None:
        self.num_held -= 1
        memory.fill_(float("nan"))


class LateMark:
    def __init__(self, queue: LateQueue, until: int) -> None:
        self._queue, self._until = queue, until

    def synchronize(self) -> None:
        self._queue.run(self._until)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    """14 drawn JPEGs of which one does not decode, so that DALI's pipeline is built again on the way."""
    folder = tmp_path_factory.mktemp("copies")
    images = [drawn_jpeg(n, 32 + n, 80 - n) for n in range(14)]
    images[UNDECODABLE] = b"\xff\xd8" + b"not an image at all" * 20 + b"\xff\xd9"
    write_set(folder / "train", images, per_shard=7)
    write_set(folder / "val", images, per_shard=5)
    return DataConfig(
        path=str(folder),
        image_size=24,
        global_batch=2 * PER_STEP,
        micro_batch=2,
        threads=1,
        prefetch=PREFETCH,
        max_bad_ratio=1,
    )


def copies_late(monkeypatch) -> LateQueue:
    """The queue that every decoder started from now on copies with."""
    queue = LateQueue()
    monkeypatch.setattr(prefetcher, "DeviceCopies", lambda device, dtype: DeviceCopies(device, dtype, queue))
    return queue


def behind(batches: Iterator[Batch], prefetch: int, late: LateQueue | None) -> list[Batch]:
    """All batches as they were handed out; where copies are late, taken once the decoder has queued all that it may."""
    taken = [as_it_is(next(batches))]  # starts the decoder, and lets it go on
    if late is not None:
        late.wait_for(1 + prefetch)
    return [*taken, *map(as_it_is, batches)]


def as_it_is(batch: Batch) -> Batch:
    return Batch(batch.images.clone(), batch.labels.clone(), batch.valid.clone(), batch.position)


def trained(data: DataConfig, dtype: torch.dtype, late: LateQueue | None = None, start: int = 0) -> list[Batch]:
    one = Loader(data, seed=5, rank=0, world_size=1, device=CPU, dtype=dtype)
    batches = behind((batch for step in one.steps(start, STEPS) for batch in step), data.prefetch, late)
    one.close()
    return batches


def evaluated(data: DataConfig, late: LateQueue | None = None) -> list[Batch]:
    return behind(evaluation_batches(data, rank=0, world_size=1, device=CPU), data.prefetch, late)


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert [batch.position for batch in ours] == [batch.position for batch in theirs]
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.equal(mine.images, its.images)  # a NaN is never equal
        assert mine.images.stride() == its.images.stride()
        assert mine.images.dtype == its.images.dtype
        assert torch.equal(mine.labels, its.labels)
        assert torch.equal(mine.valid, its.valid)


@pytest.mark.parametrize(
    ("dtype", "start", "prefetch"),
    [
        (torch.float32, 0, PREFETCH),
        (torch.bfloat16, 2, PREFETCH),
        (torch.float32, 1, 1),  # no batch is made before the last one was taken: only its hand-over waits for it
    ],
)
def test_training_gets_whole_batches_from_memory_that_is_taken_back(data, dtype, start, prefetch, monkeypatch):
    data = replace(data, prefetch=prefetch)
    wanted = trained(data, dtype, start=start)
    late = copies_late(monkeypatch)
    assert_same(trained(data, dtype, late, start), wanted)
    assert late.num_held == 0, "at the end all of DALI's outputs are given back"


def test_an_evaluation_gets_whole_batches_from_memory_that_is_taken_back(data, monkeypatch):
    wanted = evaluated(data)
    late = copies_late(monkeypatch)
    assert_same(evaluated(data, late), wanted)
    assert late.num_held == 0


def test_a_loader_that_is_left_early_gives_back_what_it_held(data, monkeypatch):
    late = copies_late(monkeypatch)
    one = Loader(data, seed=5, rank=0, world_size=1, device=CPU)
    next(next(one.steps(0, STEPS)))
    late.wait_for(1 + PREFETCH)  # then the decoder waits for room
    assert late.num_held > 0
    one.close()
    assert late.num_held == 0
