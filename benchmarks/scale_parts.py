"""The parts that benchmarks/scale.py really runs: order and cache at any number of ranks, a checkpoint, metrics."""

import hashlib
import statistics
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pipeline.config import ModelConfig
from pipeline.data.cache import Cache, cached_bytes
from pipeline.data.manifest import SAMPLE_DTYPE, Shard
from pipeline.data.order import Order
from pipeline.data.remote import Remote
from pipeline.data.samples import REASONS
from pipeline.metrics.catalogue import METRICS
from pipeline.metrics.rank_metrics import PHASES, RESULTS
from pipeline.metrics.snapshots import Snapshot
from pipeline.run_dir import checkpoint_files
from pipeline.snn.networks.build import build

SAMPLES = 1_281_167  # ImageNet's training split
RANKS_PER_NODE = 8


class Set(NamedTuple):
    """A shard set of ImageNet's size, cut into shards of `shard_bytes`."""

    sample_bytes: float
    shard_bytes: int
    window_shards: int

    @property
    def sizes(self) -> list[int]:
        each = int(self.shard_bytes / self.sample_bytes)
        whole, rest = divmod(SAMPLES, each)
        return [each] * whole + [rest] * (rest > 0)

    def order(self) -> Order:
        return Order(self.sizes, seed=0, window_shards=self.window_shards)


def network(config: ModelConfig) -> tuple[int, int]:
    """Number of parameters and of spiking layers."""
    with torch.device("meta"):
        model = build(config, num_classes=1000, image_size=224)
    return sum(p.numel() for p in model.parameters()), len(model.spiking_layers())


def every_sample_once(data: Set, world_size: int, micro_batch: int) -> bool:
    """Whether one epoch gives each sample to exactly one rank; every rank is asked as its loader asks."""
    order, global_batch = data.order(), world_size * micro_batch
    seen = np.zeros(SAMPLES, dtype=np.int64)
    for step in range(-(-SAMPLES // global_batch)):
        for rank in range(world_size):
            epochs, numbers = order.samples(step * global_batch + rank * micro_batch, micro_batch)
            np.add.at(seen, numbers[epochs == 0], 1)
    return bool((seen == 1).all())


def planning_s(data: Set, world_size: int, micro_batch: int) -> float:
    """Seconds that one rank takes to find its samples of a whole epoch."""
    began = time.perf_counter()
    order, global_batch = data.order(), world_size * micro_batch
    for step in range(-(-SAMPLES // global_batch)):
        order.samples(step * global_batch + (world_size - 1) * micro_batch, micro_batch)
    return time.perf_counter() - began


def wanted(data: Set, world_size: int, micro_batch: int, node: int) -> Iterator[list[int]]:
    """The shards that the ranks of a node ask their cache for, request after request, in one epoch.

    As in the loader: the windows of the micro-batch, and the window that the rank needs next.
    """
    order, global_batch = data.order(), world_size * micro_batch
    for step in range(-(-SAMPLES // global_batch)):
        for rank in range(node * RANKS_PER_NODE, (node + 1) * RANKS_PER_NODE):
            first = step * global_batch + rank * micro_batch
            yield order.coming(first, first + micro_batch - 1, share=micro_batch, global_batch=global_batch)


def downloads(requests: Iterator[list[int]], capacity: int) -> int:
    """Shards fetched by a cache that holds `capacity` of them and drops the one least recently used."""
    held: OrderedDict[int, None] = OrderedDict()
    fetched = 0
    for shards in requests:
        for shard in shards:
            if shard in held:
                held.move_to_end(shard)
                continue
            if len(held) == capacity:
                held.popitem(last=False)
            held[shard] = None
            fetched += 1
    return fetched


class _Counting(Remote):
    fetched = 0

    def fetch(self, name, path, check) -> None:
        self.fetched += name.endswith(".tar")
        super().fetch(name, path, check)


def real_downloads(data: Set, world_size: int, micro_batch: int, node: int, capacity: int) -> int:
    """As `downloads`, by the real `pipeline.data.cache.Cache`, with tiny shards from a folder as the store."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "store")
        store.mkdir()
        shards = [_tiny_shard(store, number) for number in range(len(data.sizes))]
        remote = _Counting(f"file://{store}")
        each = sum((store / name).stat().st_size for name in (shards[0].tar, shards[0].samples))
        room = (capacity - 1) * each + cached_bytes(shards[0])  # a download counts with the most that it may take
        cache = Cache(f"{folder}/cache", remote, capacity_bytes=room)
        for numbers in wanted(data, world_size, micro_batch, node):
            for number in numbers:
                cache.hold(shards[number]).release()
        cache.close()
        return remote.fetched


def _tiny_shard(store: Path, number: int) -> Shard:
    name = f"train-{number:06d}"
    (store / f"{name}.tar").write_bytes(number.to_bytes(8, "little"))
    np.save(store / f"{name}.npy", np.zeros(1, dtype=SAMPLE_DTYPE))
    digest = {end: hashlib.sha256((store / f"{name}.{end}").read_bytes()).hexdigest() for end in ("tar", "npy")}
    return Shard(
        name=name,
        num_samples=1,
        num_bytes=8,
        sha256=digest["tar"],
        index_sha256=digest["tar"],
        samples_sha256=digest["npy"],
    )


class Checkpoint(NamedTuple):
    num_bytes: int
    save_s: float
    load_s: float


def checkpoint(num_parameters: int) -> Checkpoint:
    """A checkpoint of `num_parameters` fp32 weights and as much momentum: rank 0 writes it, every rank reads it."""
    tensors = {name: torch.randn(num_parameters) for name in ("parameters", "momentum")}
    saves, loads, num_bytes = [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        for step in range(5):
            began = time.perf_counter()
            final = checkpoint_files.save(Path(folder), step, tensors)
            saved = time.perf_counter()
            assert checkpoint_files.load_newest(Path(folder)) is not None
            saves, loads = [*saves, saved - began], [*loads, time.perf_counter() - saved]
            num_bytes = sum(path.stat().st_size for path in final.iterdir())
    return Checkpoint(num_bytes, statistics.median(saves), statistics.median(loads))


def snapshots(folder: Path, num_layers: int, *, first: bool) -> None:
    """Writes a node's metrics: each rank's own and the supervisor's restarts. On the first node rank 0 adds all others,
    and those of the layers.
    """
    values = {
        "phase": PHASES,
        "reason": REASONS,
        "result": RESULTS,
        "layer": [f"{layer:02d}-layer{layer}.neuron" for layer in range(num_layers)],
    }
    supervisor = Snapshot(folder, "supervisor", run="imagenet", node="0")
    supervisor.set("run_restarts", 0)
    supervisor.write()
    for rank in range(RANKS_PER_NODE):
        shown = Snapshot(folder, f"rank-{rank}", run="imagenet", rank=str(rank))
        for name, metric in METRICS.items():
            if name == "run_restarts" or ("rank" not in metric.labels and not (first and rank == 0)):
                continue
            others = [label for label in metric.labels if label != "rank"]
            for combined in product(*(values.get(label, ["some"]) for label in others)):
                shown.set(name, 1234.56789, **dict(zip(others, combined, strict=True)))
        shown.write()
