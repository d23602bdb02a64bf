"""What benchmarks/scale.py counts is what the program does, at sizes that a test can afford."""

import json

import pytest

from benchmarks import scale, scale_parts
from benchmarks.scale_parts import Set, downloads, every_sample_once, real_downloads, wanted
from launch.recipes import RECIPES
from pipeline.metrics.catalogue import METRICS
from pipeline.metrics.exporter import FOLDER_VARIABLE
from pipeline.metrics.rank_metrics import RankMetrics
from tests.conftest import ROOT

NAMES = ("rank-0.json", "rank-1.json")
SMALL = Set(sample_bytes=1.0, shard_bytes=100, window_shards=4)


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    monkeypatch.setattr(scale_parts, "SAMPLES", 2_050)  # 20 shards of 100 and one of 50


def test_every_rank_together_gets_every_sample_once():
    assert every_sample_once(SMALL, world_size=64, micro_batch=4)


@pytest.mark.parametrize("capacity", [10, 21])
def test_the_real_cache_fetches_what_is_counted(capacity):
    requests = list(wanted(SMALL, 16, 4, node=1))
    assert downloads(iter(requests), capacity) == real_downloads(SMALL, 16, 4, 1, capacity)


def test_a_small_cache_fetches_again_and_a_large_one_each_shard_once():
    requests = list(wanted(SMALL, 16, 4, node=0))
    distinct = len({shard for shards in requests for shard in shards})
    assert downloads(iter(requests), len(SMALL.sizes)) == distinct == len(SMALL.sizes)
    assert downloads(iter(requests), 8) > distinct


def test_of_the_windows_that_a_large_batch_passes_over_nothing_is_fetched():
    order, needed = SMALL.order(), set()  # 512 samples a batch, 400 a window
    for step in range(5):
        needed |= {int(shard) for at in (512 * step, 512 * step + 31) for shard in order.shards_at(at)}
    requests = list(wanted(SMALL, 128, 4, node=0))
    ahead_of_the_end = {int(shard) for shard in order.shards_at(5 * 512)}
    assert {shard for shards in requests for shard in shards} <= needed | ahead_of_the_end
    assert downloads(iter(requests), 10) == real_downloads(SMALL, 128, 4, 0, 10)


def test_more_gpus_fail_more_often_and_checkpoints_follow():
    few, many = scale.lost_work(8, 500, 2), scale.lost_work(4096, 500, 2)
    assert few[0] == 512 * many[0]
    assert few[1] < many[1]
    assert few[2] > many[2]


def test_the_committed_figures_are_of_these_assumptions():
    results = json.loads((ROOT / "benchmarks/results/scale.json").read_text())
    assert results["assumed"] == {name: {"value": value, "what": what} for name, (value, what) in scale.ASSUMED.items()}
    assert all(row["met"] in (None, True) for row in results["rows"])


def test_a_page_of_metrics_holds_what_each_rank_shows(tmp_path, monkeypatch):
    """The labels that a rank declares at its start; while it trains it adds only its own labels and those of layers."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    about = {"world_size": 8, "layers": ["a", "b", "c"], "num_steps": 1, "identity": "0"}
    own = RankMetrics(RECIPES["digits"](), rank=1, local_rank=1, **about)
    first = RankMetrics(RECIPES["digits"](), rank=0, local_rank=0, **about)
    gauges = [name for name, metric in METRICS.items() if metric.kind == "gauge"]
    for name in gauges:
        if METRICS[name].labels in ((), ("rank",)):
            for metrics in (own, first) if METRICS[name].labels else (first,):
                metrics.publish({name: 1.0})
        elif METRICS[name].labels == ("layer",):
            first.publish({name: [1.0, 1.0, 1.0]})
    own.write()
    first.write()
    count = {name: sum(map(len, json.loads((tmp_path / name).read_text()).values())) for name in NAMES}
    assert scale.scrape(3, 1, first=False)[0] == 8 * count["rank-1.json"] + 1
    assert scale.scrape(3, 1, first=True)[0] == 7 * count["rank-1.json"] + count["rank-0.json"] + 1
