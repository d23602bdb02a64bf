"""Shards → batches on the device, through DALI: decode a window, resize, flip, normalise.

    Order → numbers → reader thread: records, windows, bytes (pread) → DALI (its own threads) → Batch

One graph serves the GPU (`mixed` decoding) and the CPU. Readers are threads, not processes: reading releases the
interpreter's lock, there is nothing to orphan, and a resume costs no start-up.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from pipeline.config import DataConfig
from pipeline.cores import cores_per_rank
from pipeline.data.augment import Windows, central_windows, random_windows
from pipeline.data.manifest import Manifest, read_samples
from pipeline.data.order import Order
from pipeline.errors import ConfigError, DataError

MEAN = (123.675, 116.28, 103.53)  # of ImageNet, in 8-bit levels
STD = (58.395, 57.12, 57.375)


class Batch(NamedTuple):
    images: Tensor
    """`(m, 3, H, W)` float32, normalised, channels-last, on the device."""
    labels: Tensor
    """`(m,)` int64, on the device."""
    valid: Tensor
    """`(m,)` bool; False pads an evaluation's last batch."""
    position: int
    """Stream position of the first sample."""


class _Request(NamedTuple):
    """A micro-batch before decoding; `count` of its `m` samples are real, the rest repeats the first."""

    encoded: list[np.ndarray]
    windows: Windows
    labels: np.ndarray
    count: int
    position: int


class Shards:
    """A shard set's records and bytes.

    Raises:
        ConfigError: there is no set in the folder.
        DataError: a file of it is missing, damaged or shorter than the manifest says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, Manifest.load(folder)
        self._records = [read_samples(folder, shard) for shard in self.manifest.shards]
        self._ends = np.cumsum([shard.num_samples for shard in self.manifest.shards])
        self._files: dict[int, int] = {}

    def records(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard index and `SAMPLE_DTYPE` record of each sample number."""
        shards = np.searchsorted(self._ends, numbers, side="right")
        first = np.concatenate(([0], self._ends))[shards]
        rows = [self._records[s][n - f] for s, n, f in zip(shards, numbers, first, strict=True)]
        return shards, np.array(rows, dtype=self._records[0].dtype)

    def read(self, shard: int, offset: int, length: int) -> np.ndarray:
        """`length` bytes of a shard's tar from `offset`, uint8."""
        name = self.manifest.shards[shard].tar
        try:
            if shard not in self._files:
                self._files[shard] = os.open(self.folder / name, os.O_RDONLY)
            content = os.pread(self._files[shard], length, offset)
        except OSError as error:
            raise DataError(f"{self.folder / name} cannot be read ({error.strerror})") from None
        if len(content) != length:
            raise DataError(f"{self.folder / name} ends before byte {offset + length}; run python -m data_prep verify")
        return np.frombuffer(content, dtype=np.uint8)

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


class _Stream:
    """Micro-batches of one job: a reader thread reads ahead of DALI, and DALI decodes ahead of whoever iterates."""

    def __init__(self, data: DataConfig, device: torch.device) -> None:
        self._data, self._device = data, device
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="shard-reader")
        self.wait_s = 0.0

    def run(self, prepare: Callable[[int], _Request], indices: range) -> Iterator[Batch]:
        """`prepare(i)`, decoded, for each i in `indices`."""
        ahead = iter(indices)
        reading: deque[Future[_Request]] = deque()
        decoding: deque[_Request] = deque()

        def read_on() -> None:
            index = next(ahead, None)
            if index is not None:
                reading.append(self._reader.submit(prepare, index))

        def feed():
            if not reading:
                raise StopIteration
            request = reading.popleft().result()
            read_on()
            decoding.append(request)
            return [request.encoded, *request.windows]

        for _ in range(2 * self._data.prefetch):
            read_on()
        graph = _graph(self._data, self._device, feed)
        for _ in indices:
            began = time.monotonic()
            (images,) = graph.run()
            batch = self._batch(torch.from_dlpack(images.as_tensor()), decoding.popleft())
            self.wait_s += time.monotonic() - began
            yield batch

    def _batch(self, images: Tensor, request: _Request) -> Batch:
        size = len(request.labels)
        return Batch(
            images=images.clone().permute(0, 3, 1, 2),  # a copy: DALI reuses its buffer
            labels=torch.from_numpy(request.labels).to(self._device),
            valid=(torch.arange(size) < request.count).to(self._device),
            position=request.position,
        )

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)


def _graph(data: DataConfig, device: torch.device, feed: Callable[[], list]):
    """DALI's pipeline: what `feed` returns → `(m, H, W, 3)` float32."""
    on_gpu = device.type == "cuda"

    @pipeline_def(
        batch_size=data.micro_batch,
        num_threads=data.threads or cores_per_rank(),
        device_id=device.index if on_gpu else None,
        prefetch_queue_depth=data.prefetch,
    )
    def graph():
        encoded, anchors, shapes, flips = fn.external_source(
            source=feed,
            num_outputs=4,
            batch=True,
            dtype=[types.UINT8, types.INT32, types.INT32, types.INT32],
            ndim=[1, 1, 1, 0],
        )
        images = fn.decoders.image_slice(
            encoded,
            anchors,
            shapes,
            axes=[0, 1],
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            jpeg_fancy_upsampling=True,  # else GPU and CPU decode to different pixels
            hw_decoder_load=0.0,
        )
        images = fn.resize(images, size=[data.image_size] * 2, interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.crop_mirror_normalize(
            images, mirror=flips, dtype=types.FLOAT, output_layout="HWC", mean=list(MEAN), std=list(STD)
        )

    pipeline = graph()
    pipeline.build()
    return pipeline


class Loader:
    """The training split's stream for one rank.

    Args:
        data: the data configuration; `global_batch` over `world_size` in micro-batches is this rank's share.
        seed: of the order and the augmentation.
        rank, world_size: this rank's place.
        device: where batches go; a CUDA device decodes on the GPU.
        split: folder of the shard set below `data.path`.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device,
        split: str = "train",
    ) -> None:
        self._data, self._seed, self._rank = data, seed, rank
        self._share = data.global_batch // world_size
        self._accumulation = self._share // data.micro_batch
        if self._accumulation * data.micro_batch * world_size != data.global_batch:
            raise ConfigError(
                f"data.global_batch={data.global_batch} does not divide over {world_size} ranks in micro-batches of "
                f"{data.micro_batch}; use a multiple of {data.micro_batch * world_size}"
            )
        self._shards = Shards(Path(data.path) / split)
        self.manifest = self._shards.manifest
        self._order = Order(
            [shard.num_samples for shard in self.manifest.shards], seed=seed, window_shards=data.window_shards
        )
        self._stream = _Stream(data, device)
        self._step = 0

    @property
    def wait_s(self) -> float:
        """Seconds that the training loop has waited for data."""
        return self._stream.wait_s

    def steps(self, start: int, stop: int) -> Iterator[Iterator[Batch]]:
        """The micro-batches of each optimizer step in [start, stop), read and decoded ahead of use."""
        batches = self._stream.run(self._request, range(start * self._accumulation, stop * self._accumulation))
        for step in range(start, stop):
            yield (next(batches) for _ in range(self._accumulation))
            self._step = step + 1

    def _request(self, micro_batch: int) -> _Request:
        """The rank's `micro_batch`-th micro-batch of the run."""
        m = self._data.micro_batch
        step, within = divmod(micro_batch, self._accumulation)
        position = step * self._data.global_batch + self._rank * self._share + within * m
        epochs, numbers = self._order.samples(position, m)
        shards, records = self._shards.records(numbers)
        windows = random_windows(
            self._seed,
            epochs,
            numbers,
            np.stack((records["height"], records["width"]), axis=1),
            area_min=self._data.crop_area_min,
            aspect=self._data.crop_aspect,
            flip=self._data.flip,
        )
        return _request(self._shards, shards, records, windows, m, position)

    def state_dict(self) -> dict[str, object]:
        """The position, and what the stream's meaning depends on."""
        return {"step": self._step, **self._identity()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Takes over a position.

        Raises:
            ConfigError: the state is of another data set, seed, batch or window; the message names which.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise ConfigError(
                    f"the checkpoint was made with {name}={state[name]!r}, this run has {value!r}; "
                    "go on with the old value, or start a new run with another --run_dir"
                )
        self._step = int(state["step"])  # pyright: ignore[reportArgumentType]

    def _identity(self) -> dict[str, object]:
        return {
            "data_identity": self.manifest.identity,
            "seed": self._seed,
            "global_batch": self._data.global_batch,
            "micro_batch": self._data.micro_batch,
            "window_shards": self._data.window_shards,
        }

    def close(self) -> None:
        """Ends the reader thread and closes the shards."""
        self._stream.close()
        self._shards.close()


def evaluation_batches(
    data: DataConfig, *, rank: int, world_size: int, device: torch.device, split: str = "val"
) -> Iterator[Batch]:
    """Every sample of a split exactly once over all ranks; each rank gets the same number of batches."""
    shards, m = Shards(Path(data.path) / split), data.micro_batch
    total = shards.manifest.num_samples
    per_rank = -(-total // (m * world_size))

    def request(index: int) -> _Request:
        position = (rank * per_rank + index) * m
        count = min(max(total - position, 0), m)
        numbers = np.where(np.arange(m) < count, position + np.arange(m), 0)
        owners, records = shards.records(numbers)
        windows = central_windows(
            np.stack((records["height"], records["width"]), axis=1).astype(np.int64),
            image_size=data.image_size,
            resize=data.eval_resize or data.image_size,
        )
        return _request(shards, owners, records, windows, count, position)

    stream = _Stream(data, device)
    try:
        yield from stream.run(request, range(per_rank))
    finally:
        stream.close()
        shards.close()


def _request(
    shards: Shards, owners: np.ndarray, records: np.ndarray, windows: Windows, count: int, position: int
) -> _Request:
    encoded = [
        shards.read(int(owner), int(record["offset"]), int(record["length"]))
        for owner, record in zip(owners, records, strict=True)
    ]
    return _Request(encoded, windows, records["label"].astype(np.int64), count, position)
