"""The least cache size: enough for a node's ranks at once, not much more, and no deadlock with less."""

import re
import threading
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pipeline.config import DataConfig
from pipeline.data.cache import READ_AHEAD, Cache, cached_bytes, evaluation_bytes, training_shards
from pipeline.data.loader import Loader, evaluation_batches
from pipeline.data.manifest import Manifest, Shard
from pipeline.data.order import Order
from pipeline.data.remote import Remote
from pipeline.data.shard_reader import Shards
from pipeline.errors import ConfigError
from tests.support.data_servers import serve
from tests.support.data_sets import drawn_jpeg, write_set

CPU = torch.device("cpu")
NUM = 60


@st.composite
def settings_of_a_run(draw, most_ranks: int = 4) -> dict[str, int]:
    """World size, ranks a node, micro-batch, share and global batch that fit together; and a window size."""
    ranks, nodes = draw(st.integers(1, most_ranks)), draw(st.integers(1, 4))
    micro_batch = draw(st.integers(1, 12))
    share = micro_batch * draw(st.integers(1, 4))
    return {
        "ranks": ranks,
        "micro_batch": micro_batch,
        "share": share,
        "global_batch": share * ranks * nodes,
        "window_shards": draw(st.integers(0, 5)),
    }


def at_once(sizes: list[int], run: dict[str, int], *, seed: int, node: int, steps: int) -> int:
    """The most shards that a node's ranks need at once, found from every micro-batch of every rank."""
    order, most = Order(sizes, seed=seed, window_shards=run["window_shards"]), 0
    share, m, batch = run["share"], run["micro_batch"], run["global_batch"]
    for step in range(steps):
        for within in range(0, share, m):
            wanted: set[int] = set()
            for rank in range(node * run["ranks"], (node + 1) * run["ranks"]):
                first = step * batch + rank * share + within
                wanted |= set(order.coming(first, first + m - 1, share=share, global_batch=batch))
            most = max(most, len(wanted))
    return most


@settings(max_examples=60)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=25).filter(any), settings_of_a_run(), st.integers(0, 9))
def test_a_node_never_wants_more_shards_at_once_than_are_counted(sizes, run, seed):
    counted = training_shards(sizes, **run)
    nodes = run["global_batch"] // run["share"] // run["ranks"]
    assert at_once(sizes, run, seed=seed, node=seed % nodes, steps=12) <= counted <= len(sizes)


@settings(max_examples=60)
@given(st.integers(1, 30), st.integers(1, 60), settings_of_a_run())
def test_of_shards_of_one_size_hardly_more_are_counted_than_some_node_wants(size, count, run):
    counted = training_shards([size] * count, **run)
    nodes = run["global_batch"] // run["share"] // run["ranks"]
    epoch = -(-size * count // run["global_batch"])
    wanted = max(at_once([size] * count, run, seed=0, node=node, steps=3 * epoch + 3) for node in range(nodes))
    window = run["window_shards"] or count
    assert counted <= 2 * wanted + window


@given(st.lists(st.integers(0, 30), min_size=1, max_size=25).filter(any), st.integers(1, 40), st.integers(1, 4))
def test_an_evaluation_is_counted_with_what_it_reads_from_and_fetches_ahead(sizes, micro_batch, ranks):
    hashes = dict.fromkeys(("sha256", "index_sha256", "samples_sha256"), "0" * 64)
    shards = [Shard(name=f"{i}", num_samples=n, num_bytes=1000 * i, **hashes) for i, n in enumerate(sizes)]
    manifest = Manifest(split="val", classes=("one",), shards=tuple(shards))
    owners, of_one = np.repeat(np.arange(len(sizes)), sizes), 0
    for first in range(0, len(owners), micro_batch):
        here = owners[first : first + micro_batch]
        of_one = max(of_one, sum(cached_bytes(shard) for shard in shards[here[0] : here[-1] + 1 + READ_AHEAD]))
    counted = evaluation_bytes(manifest, micro_batch=micro_batch, ranks=ranks)
    assert counted == min(ranks * of_one, sum(cached_bytes(shard) for shard in shards))


@pytest.fixture(scope="module")
def origins(tmp_path_factory) -> dict[int, Path]:
    """Sets of small images, by images per shard; the validation split has larger shards."""
    folders = {}
    for size in (1, 4, 9):
        folders[size] = tmp_path_factory.mktemp(f"shards-of-{size}")
        write_set(folders[size] / "train", [drawn_jpeg(n, 8, 8) for n in range(NUM)], per_shard=size)
        write_set(folders[size] / "val", [drawn_jpeg(n, 30, 30) for n in range(17)], per_shard=size + 1)
    return folders


def loader(data: DataConfig, rank: int, ranks: int) -> Loader:
    return Loader(data, seed=3, rank=rank, world_size=ranks, device=CPU)


def demanded(data: DataConfig, ranks: int) -> int:
    with pytest.raises(ConfigError) as caught:
        loader(data, 0, ranks)
    found = re.search(r"data\.cache_bytes=1 does not hold .* use at least (\d+), or a smaller", str(caught.value))
    assert found, caught.value
    return int(found[1])


def together(*ranks) -> None:
    """Runs each call in its own thread until all end; raises the first error."""
    raised: list[BaseException] = []

    def guarded(call) -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in raised:
        raise error


@settings(max_examples=15, phases=[Phase.generate])
@given(st.sampled_from([1, 4, 9]), settings_of_a_run(), st.integers(0, 2**30))
def test_ranks_that_read_as_far_ahead_as_they_like_never_stall(origins, tmp_path_factory, size, run, start):
    """Farther than `data.prefetch` allows: these readers are not throttled."""
    ranks = run["global_batch"] // run["share"]
    fields = {name: run[name] for name in ("micro_batch", "global_batch", "window_shards")}
    folder = tmp_path_factory.mktemp("cache")
    settings = {"path": f"file://{origins[size]}", "cache_dir": str(folder), **fields}
    with patch.dict("os.environ", LOCAL_SIZE=str(run["ranks"])):
        data = DataConfig(cache_bytes=demanded(DataConfig(cache_bytes=1, **settings), ranks), **settings)
        readers = [loader(data, rank, ranks) for rank in range(run["ranks"])]

    def read(one: Loader) -> None:
        for index in range(start, start + 20):
            one._request(index)

    try:
        together(*(lambda one=one: read(one) for one in readers))
    finally:
        for one in readers:
            one.close()


def test_three_ranks_get_on_with_room_for_one_shard(origins, tmp_path):
    """As if another run used the rest of the cache: slow, as shards are downloaded again and again, but no stall."""
    data = DataConfig(
        path=f"file://{origins[4]}", cache_dir=str(tmp_path), global_batch=24, micro_batch=8, window_shards=3
    )
    readers = [loader(data, rank, 3) for rank in range(3)]
    room = max(cached_bytes(shard) for shard in readers[0].manifest.shards)
    for one in readers:
        remote = Remote(f"file://{origins[4]}/train")
        one._shards._cache = Cache(str(tmp_path), remote, capacity_bytes=room)
    try:
        together(*(lambda one=one: [one._request(index) for index in range(5)] for one in readers))
    finally:
        for one in readers:
            one.close()


def test_four_ranks_in_step_with_evaluations_between_fit_into_what_is_demanded(origins, tmp_path):
    settings = {"path": f"file://{origins[9]}", "cache_dir": str(tmp_path), "image_size": 8, "threads": 1}
    settings |= {"global_batch": 32, "micro_batch": 4, "window_shards": 1, "prefetch": 2}
    data = DataConfig(cache_bytes=demanded(DataConfig(cache_bytes=1, **settings), 4), **settings)
    in_step, counted = threading.Barrier(4), []

    def train(rank: int) -> None:
        one = loader(data, rank, 4)
        try:
            for micro_batches in one.steps(0, 4):
                for _ in micro_batches:
                    pass
                in_step.wait()  # as in the gradient's all-reduce
                counted.extend(
                    int(b.valid.sum()) for b in evaluation_batches(data, rank=rank, world_size=4, device=CPU)
                )
        except BaseException:
            in_step.abort()
            raise
        finally:
            one.close()

    together(*(lambda rank=rank: train(rank) for rank in range(4)))
    assert sum(counted) == 4 * 17


def test_two_evaluations_get_on_with_room_for_one_shard(origins, tmp_path):
    path = f"file://{origins[4]}"
    room = max(cached_bytes(shard) for shard in Manifest.load(f"{path}/val").shards)
    data = DataConfig(path=path, cache_dir=str(tmp_path), cache_bytes=room, image_size=8, micro_batch=2, threads=1)
    both = [evaluation_batches(data, rank=rank, world_size=2, device=CPU) for rank in range(2)]
    assert sum(int(batch.valid.sum()) for batches in zip(*both, strict=True) for batch in batches) == 17


def test_what_is_demanded_holds_the_training_and_the_evaluation(origins, tmp_path):
    settings = {"path": f"file://{origins[4]}", "cache_dir": str(tmp_path), "micro_batch": 4, "global_batch": 8}
    data = DataConfig(cache_bytes=1, window_shards=2, **settings)
    train, val = (Manifest.load(f"{data.path}/{split}") for split in ("train", "val"))
    sizes = [shard.num_samples for shard in train.shards]
    run = {"window_shards": 2, "ranks": 2, "share": 4, "micro_batch": 4, "global_batch": 8}
    largest = sorted(map(cached_bytes, train.shards))[-training_shards(sizes, **run) :]
    assert len(largest) < len(sizes)
    needed = sum(largest) + evaluation_bytes(val, micro_batch=4, ranks=2)
    assert demanded(data, 2) == needed
    loader(replace(data, cache_bytes=needed), 0, 2).close()
    with pytest.raises(ConfigError, match=f"use at least {needed}"):
        loader(replace(data, cache_bytes=needed - 1), 0, 2)


def test_an_evaluation_drops_its_own_shards_and_not_those_of_the_training(origins, tmp_path):
    train, val = (f"file://{origins[4]}/{split}" for split in ("train", "val"))
    first, largest = (max(map(cached_bytes, Manifest.load(url).shards)) for url in (train, val))
    training, evaluation = (Shards(u, cache_dir=str(tmp_path), cache_bytes=first + 2 * largest) for u in (train, val))
    training.locate(np.array([0]))
    training.rest()
    for shard in range(4):
        evaluation.expect([shard], once=True)
        evaluation.locate(np.array([5 * shard]))
        evaluation.rest()
    there = {folder.name.rsplit("-", 1)[0] for folder in tmp_path.iterdir()}
    assert {"train-000000", "val-000003"} <= there
    training.close()
    evaluation.close()


class Polled(threading.Event):
    """Counts how often it was waited for."""

    times = 0

    def wait(self, timeout: float | None = None) -> bool:
        self.times += 1
        return super().wait(timeout)


def test_room_is_waited_for_as_long_as_a_shard_is_on_its_way(origins, tmp_path):
    """However slow the download is: once complete, the shard can be evicted."""
    with serve(origins[4]) as server:
        shards = Manifest.load(f"{server.url}/train").shards
        server.faults[shards[0].tar] = ["stalled"]
        room = max(map(cached_bytes, shards))
        slow, waiting = (
            Cache(str(tmp_path), Remote(f"{server.url}/train"), capacity_bytes=room, patience_s=0.1) for _ in range(2)
        )
        waiting._remote.stopped = polled = Polled()

        def wait_for_room() -> None:
            while not list(tmp_path.glob(f"*.part/{shards[0].tar}")):
                pass
            try:
                waiting.hold(shards[1]).release()
            finally:
                polled.times = 20

        def let_it_go_on() -> None:
            while polled.times < 20:
                pass
            server.release.set()

        together(lambda: slow.hold(shards[0]).release(), wait_for_room, let_it_go_on)
        assert server.requests[shards[0].tar] == 2
        slow.close()
        waiting.close()
