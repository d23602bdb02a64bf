"""What 8, 64, 512 and 4,096 GPUs would need of each part, from measured costs:  python -m benchmarks.scale [--quick]

SEW-ResNet34 on ImageNet, T=4, one micro-batch of 32 a GPU and step. Sizes and counts come from the program itself:
order and cache are run at every size (scale_parts.py), a checkpoint is written, a page of metrics is served. Rates of
hardware that was not available are ASSUMED; the results list them beside the figures made from them.
"""

import argparse
import math
import statistics
import tempfile
import time
import urllib.request
from pathlib import Path

import torch

from benchmarks import launches
from benchmarks import scale_parts as parts
from benchmarks.table import processor, row, show, write
from launch.recipes import RECIPES
from pipeline.chi.comm_hook import Limbs
from pipeline.chi.indicators import gradient_sums
from pipeline.metrics.exporter import NodeServer

SIZES = (8, 64, 512, 4096)
RECIPE = "imagenet_sew34_chi"
SHARD_BYTES, WINDOW_SHARDS = 256 << 20, 16  # the defaults of data_prep and the recipe
SMALL_SHARD_BYTES, SMALL_WINDOW = 32 << 20, 1

ASSUMED = {
    "gpu_images_per_s": (183.0, "images/s a GPU, training: the original SEW-ResNet code on 8 GPUs"),
    "node_network_bytes_per_s": (12.5e9, "a node's share of the network between nodes: 100 Gbit/s"),
    "gpu_link_bytes_per_s": (150e9, "between GPUs of one node, a direction"),
    "gpu_memory_bytes_per_s": (2e12, "of a GPU's memory"),
    "launch_s": (8e-6, "of the host for one kernel or torch operator, with autograd's share"),
    "hop_latency_s": (20e-6, "of one step of a tree between nodes"),
    "gpu_mtbf_h": (50_000.0, "hours between failures of one GPU and its share of the node: 419 in 54 days of 16,384"),
    "restart_s": (60.0, "from a failure that is noticed to the next step: supervisors, start of ranks, first batch"),
    "store_bytes_per_s": (10e9, "what the store of the shards gives to all nodes together"),
    "sample_bytes": (2_087_031_792 / 19_200, "bytes an image: ilsvrc-mini, benchmarks/results/shard_writing.json"),
    "loader_images_per_s_core": (446.0, "images/s a core decodes: benchmarks/results/loader.json"),
}
"""Name: (value, what it is and its source). The last two were measured by other benchmarks here."""


def assumed(name: str) -> float:
    return ASSUMED[name][0]


def scrape(num_layers: int, repeats: int, *, first: bool) -> tuple[int, int, float]:
    """Series and bytes of a node's metrics page, and the median seconds to read it. `first`: the node of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        parts.snapshots(Path(folder), num_layers, first=first)
        server = NodeServer(Path(folder), host="127.0.0.1", port=0)
        times, page = [], b""
        for _ in range(repeats):
            began = time.perf_counter()
            with urllib.request.urlopen(server.address) as answer:
                page = answer.read()
            times.append(time.perf_counter() - began)
        server.close()
    series = sum(1 for line in page.splitlines() if line and not line.startswith(b"#"))
    return series, len(page), statistics.median(times)


def reduce_s(num_bytes: float, gpus: int) -> float:
    """Seconds of an all-reduce: within nodes, then between them, where each node's link carries all bytes twice."""
    nodes, inside = gpus // parts.RANKS_PER_NODE, min(gpus, parts.RANKS_PER_NODE)
    seconds = 2 * num_bytes * (inside - 1) / inside / assumed("gpu_link_bytes_per_s")
    if nodes > 1:
        seconds += 2 * num_bytes * (nodes - 1) / nodes / assumed("node_network_bytes_per_s")
        seconds += 2 * math.ceil(math.log2(nodes)) * assumed("hop_latency_s")
    return seconds


def chi_bytes(num_layers: int, gpus: int) -> int:
    """Bytes of a step's all-reduce that are χ's: three counts a layer, each as fp32 limbs."""
    return num_layers * 3 * Limbs(gpus).per_count * 4


def num_launches() -> int:
    """Launches of a micro-batch, and the two that χ adds; they do not depend on its size."""
    images = torch.empty(2, 3, 224, 224, dtype=torch.float16, device="meta")
    return sum(one.total for one in launches.trace(launches.network(torch.float16), images)) + 2


def first_epoch_bytes(data: parts.Set, gpus: int, micro_batch: int) -> float:
    """Bytes that a node fetches in the first epoch with an unlimited cache: mean of the first, middle and last node."""
    nodes = sorted({0, gpus // parts.RANKS_PER_NODE // 2, gpus // parts.RANKS_PER_NODE - 1})
    counts = [parts.downloads(parts.wanted(data, gpus, micro_batch, node), len(data.sizes)) for node in nodes]
    return statistics.mean(counts) * data.shard_bytes


def lost_work(gpus: int, every_s: float, save_s: float) -> tuple[float, float, float]:
    """Hours between failures, share of time lost to failures and checkpoints, best checkpoint interval in seconds."""
    mtbf_s = assumed("gpu_mtbf_h") * 3600 / gpus
    lost = save_s / every_s + (every_s / 2 + assumed("restart_s")) / mtbf_s
    return mtbf_s / 3600, lost, math.sqrt(2 * save_s * mtbf_s)


def at_size(
    gpus: int, num_parameters: int, num_layers: int, saved: parts.Checkpoint, series: tuple[int, int]
) -> list[tuple[str, float, str]]:
    """One column of the table: name, value, unit."""
    config = RECIPES[RECIPE]()
    micro_batch, nodes = config.data.micro_batch, gpus // parts.RANKS_PER_NODE
    usual = parts.Set(assumed("sample_bytes"), SHARD_BYTES, WINDOW_SHARDS)
    small = parts.Set(assumed("sample_bytes"), SMALL_SHARD_BYTES, SMALL_WINDOW)
    gradient, chi = 4.0 * num_parameters, chi_bytes(num_layers, gpus)
    compute = micro_batch / assumed("gpu_images_per_s")
    reduce = 1.5 * reduce_s(gradient, gpus)  # ZeRO-1 also all-gathers the new weights: half an all-reduce
    step = compute + reduce
    steps = math.ceil(parts.SAMPLES / (gpus * micro_batch))
    node_rate = parts.RANKS_PER_NODE * micro_batch / step
    usual_bytes, small_bytes = (first_epoch_bytes(data, gpus, micro_batch) for data in (usual, small))
    store = assumed("store_bytes_per_s")
    mtbf_h, lost, best = lost_work(gpus, config.train.checkpoint_every * step, saved.save_s)
    return [
        ("samples in a global batch", gpus * micro_batch, "samples"),
        ("steps of an epoch", steps, "steps"),
        ("an epoch's training", steps * step, "s"),
        ("computing a step", compute, "s"),
        ("reducing a step", reduce, "s"),
        ("share of the step spent reducing", reduce / step, "ratio"),
        ("χ's part of the reducing", 1.5 * reduce_s(gradient + chi, gpus) - reduce, "s"),
        ("planning an epoch, a rank", parts.planning_s(usual, gpus, micro_batch), "s"),
        ("cores a node to decode", node_rate / assumed("loader_images_per_s_core"), "cores"),
        ("read by a node", node_rate * assumed("sample_bytes"), "bytes/s"),
        ("read by all nodes", nodes * node_rate * assumed("sample_bytes"), "bytes/s"),
        ("fetched by a node's cache in the first epoch", usual_bytes, "bytes"),
        ("… by all nodes, time of the store", nodes * usual_bytes / store, "s"),
        ("… a node, shards of 32 MiB in windows of one", small_bytes, "bytes"),
        ("… by all nodes, time of the store, small", nodes * small_bytes / store, "s"),
        ("checkpoint read by all nodes at a resume", nodes * saved.num_bytes / store + saved.load_s, "s"),
        ("series of metrics, all nodes", series[0] + (nodes - 1) * series[1], "series"),
        ("time between failures", mtbf_h, "h"),
        ("lost to failures and checkpoints, recipe's interval", lost, "ratio"),
        ("best interval of checkpoints", best / step, "steps"),
    ]


def counting_s(num_parameters: int) -> float:
    """Seconds of the sums that χ needs, over a gradient of all parameters, on one core here."""
    gradient, times = torch.randn(num_parameters), []
    for _ in range(5):
        began = time.perf_counter()
        gradient_sums(gradient)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the cache is run at 4,096 ranks only")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    config = RECIPES[RECIPE]()
    num_parameters, num_layers = parts.network(config.model)
    repeats, launched = 20 if arguments.quick else 200, num_launches()
    series, page_bytes, scrape_s = scrape(num_layers, repeats, first=True)
    others, others_bytes, _ = scrape(num_layers, 1, first=False)
    saved = parts.checkpoint(num_parameters)
    usual = parts.Set(assumed("sample_bytes"), SHARD_BYTES, WINDOW_SHARDS)
    rows = [
        row("parameters", num_parameters, ""),
        row("checkpoint", saved.num_bytes, "bytes"),
        row("… written, hashed and on the disk, median of 5", saved.save_s, "s"),
        row("… read and checked", saved.load_s, "s"),
        row("gradient", 4 * num_parameters, "bytes"),
        row("χ beside it in the all-reduce", chi_bytes(num_layers, SIZES[-1]), "bytes"),
        row("launches of a micro-batch", launched, "launches"),
        row("… time of the host for them", launched * assumed("launch_s"), "s"),
        row("χ counted on one core here", counting_s(num_parameters), "s"),
        row("… on a GPU, by its memory's rate", 4 * num_parameters / assumed("gpu_memory_bytes_per_s"), "s"),
        row("metrics of the node of rank 0", series, "series"),
        row("… a scrape", page_bytes, "bytes"),
        row("… read", scrape_s, "s"),
        row("metrics of any other node", others, "series"),
        row("… a scrape of it", others_bytes, "bytes"),
    ]
    ranks = SIZES[-1]
    alone = parts.every_sample_once(usual, ranks, config.data.micro_batch)
    rows.append(row(f"an epoch on {ranks} ranks gives every sample once", float(alone), "", 1))
    smallest = 2 * WINDOW_SHARDS + 2
    for gpus in SIZES[-1:] if arguments.quick else SIZES[1:]:
        one = (usual, gpus, config.data.micro_batch, 0)
        real, counted = parts.real_downloads(*one, smallest), parts.downloads(parts.wanted(*one), smallest)
        rows.append(
            row(f"{gpus} ranks: shards fetched by a node's real cache over those counted", real / counted, "ratio", 1)
        )
    for gpus in SIZES:
        rows += [
            row(f"{gpus} GPUs: {name}", value, unit)
            for name, value, unit in at_size(gpus, num_parameters, num_layers, saved, (series, others))
        ]
    show(rows)
    if arguments.json:
        write(
            arguments.json,
            rows,
            hardware=f"{processor()}, one core; no GPU and no cluster: see assumed",
            versions={"torch": torch.__version__},
            command="python -m benchmarks.scale",
            setting="SEW-ResNet34, ImageNet, T=4, 32 images a GPU and step, fp32 gradients, ZeRO-1, 8 GPUs a node",
            assumed={name: {"value": value, "what": what} for name, (value, what) in ASSUMED.items()},
        )


if __name__ == "__main__":
    main()
