"""What Prometheus costs the training: processor time of snapshots and scrapes, against a step in the same run.

    python -m benchmarks.scrape [--quick] [--json FILE]

The server runs in the training process, as on a machine without a supervisor, and serves all metrics of a rank 0 with
the 36 layers of SEW-ResNet34. Another process scrapes; only the server process's processor time counts, and every
scrape finds a new snapshot. It is compared with a step of SEW-ResNet34 that is far smaller than any real one.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import table
from benchmarks.table import row
from pipeline.config import ModelConfig
from pipeline.metrics.catalogue import METRICS
from pipeline.metrics.exporter import NodeServer
from pipeline.metrics.journal import layer_labels
from pipeline.metrics.snapshots import Snapshot
from pipeline.snn import losses
from pipeline.snn.networks.build import build

INTERVAL_S = 15
"""Seconds between two scrapes, as in k8s/monitoring."""
LOG_EVERY = 10
"""Steps between two snapshots: the default of train.log_every."""
CLIENT = """
import sys, urllib.request
for line in sys.stdin:
    with urllib.request.urlopen(sys.argv[1]) as response: print(len(response.read()), flush=True)
"""


def filled(folder: Path, layers: list[str]) -> Snapshot:
    """Rank 0's snapshot with a value of full precision for every metric."""
    snapshot = Snapshot(folder, "rank-0", run="benchmark", rank="0")
    for number, (name, metric) in enumerate(METRICS.items()):
        own = [label for label in metric.labels if label not in ("rank", "layer")]
        for layer in layers if "layer" in metric.labels else [""]:
            labels = {"layer": layer} if layer else {}
            snapshot.set(name, (number + 1) / 7, **labels, **dict.fromkeys(own, "benchmark"))
    return snapshot


def costs(layers: list[str], times: int) -> tuple[list[float], list[float], int]:
    """Processor seconds of each snapshot and of each scrape, and the bytes of a scrape."""
    writes, scrapes, size = [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        snapshot = filled(Path(folder), layers)
        server = NodeServer(Path(folder), host="127.0.0.1", port=0)
        command = [sys.executable, "-c", CLIENT, server.address]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdin
            assert client.stdout
            for _ in range(times):
                began = time.process_time()
                snapshot.write()
                written = time.process_time()
                client.stdin.write("again\n")
                client.stdin.flush()
                size = int(client.stdout.readline())
                writes.append(written - began)
                scrapes.append(time.process_time() - written)
            client.stdin.close()
        server.close()
    return writes, scrapes, size


def steps(times: int) -> tuple[list[float], list[str]]:
    """Seconds of each training step of SEW-ResNet34 on 4 images of 64 x 64, T = 4; and its layers."""
    torch.manual_seed(0)
    network = build(ModelConfig(arch="sew_resnet34", T=4), num_classes=1000, image_size=64)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    images, labels = torch.randn(4, 3, 64, 64), torch.randint(1000, (4,))
    seconds = []
    for _ in range(times + 2):
        began = time.perf_counter()
        optimizer.zero_grad()
        losses.cross_entropy(network(images), labels).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return seconds[2:], layer_labels([layer.name for layer in network.spiking_layers()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few repetitions, to see that it works")
    parser.add_argument("--json", help="write the figures here")
    arguments = parser.parse_args()
    step_times, layers = steps(3 if arguments.quick else 15)
    writes, scrapes, size = costs(layers, 10 if arguments.quick else 200)
    step_s, write_s, scrape_s = (statistics.median(times) for times in (step_times, writes, scrapes))
    share = 100 * (scrape_s / INTERVAL_S + write_s / (LOG_EVERY * step_s))
    rows = [
        row(f"scrape every {INTERVAL_S} s and snapshot every {LOG_EVERY} steps, of the time", share, "%", 0.1, "lower"),
        row("… of which the scrape", 100 * scrape_s / INTERVAL_S, "%"),
        row("a scrape, processor time", 1000 * scrape_s, "ms"),
        row("a snapshot, processor time", 1000 * write_s, "ms"),
        row("a scrape's size", size / 1000, "kB"),
        row("a step", 1000 * step_s, "ms"),
        row("layers", len(layers), ""),
    ]
    table.show(rows)
    if arguments.json:
        table.write(
            arguments.json,
            rows,
            hardware=f"{table.processor()}, {os.cpu_count()} threads; no GPU was at hand",
            versions={"torch": torch.__version__, "prometheus-client": version("prometheus-client")},
            command="python -m benchmarks.scrape",
            setting="SEW-ResNet34, T=4, 4 images of 64 x 64, fp32; the server in the process that trains",
        )


if __name__ == "__main__":
    main()
