"""The training loop against the bare model: what loader, engine, χ, controller and metrics add to a step.

    python -m benchmarks.engine [--quick] [--json FILE]

SEW-ResNet34, 224 x 224, T=4, bf16, one rank on all cores. Three sides, each a process of its own, train in turn: the
plain network on images in memory with torch's SGD; the same on a DeepSpeed engine (ZeRO-1); and `pipeline.train.loop`,
which reads, decodes and augments photographs, measures χ, steers, and writes a record a step. A turn is several steps,
so that the loader cannot have prepared more than a part of it while the others trained. Images: ilsvrc-mini (the folder
that CHISPIKE_DATA names, or ../shared/data).
"""

import argparse
import os
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from benchmarks import table
from benchmarks.loader import real_images
from benchmarks.side import Side
from benchmarks.table import row
from tests.conftest import free_port
from tests.support.data_sets import write_set

SIDES = ("bare", "deepspeed", "loop")
SETTING = {"batch": 16, "micro_batch": 4}


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, list[float]]:
    """Seconds a step, by side and round, after one turn of each side to warm up."""
    write_set(scratch / "data/train", real_images(), per_shard=50)
    sides: dict[str, Side] = {}
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    try:
        for name in SIDES:
            job = {"side": name, "data": str(scratch / "data"), "run_dir": str(scratch / name), **SETTING}
            alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
            environment = {**alone, "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}
            job["threads"] = arguments.threads
            sides[name] = Side(sys.executable, "engine_side.py", job, environment)
        for turn in range(1 + arguments.rounds):
            for name in SIDES:
                spent = sides[name].ask(arguments.steps)["seconds"] / arguments.steps
                if turn:
                    seconds[name].append(spent)
    finally:
        for side in sides.values():
            side.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round of one step")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    arguments.rounds, arguments.steps = (1, 1) if arguments.quick else (5, 3)
    with tempfile.TemporaryDirectory() as scratch:
        seconds = measure(arguments, Path(scratch))
    medians = {name: statistics.median(values) for name, values in seconds.items()}

    def added(name: str, to: str) -> float:
        return statistics.median(b / a for a, b in zip(seconds[to], seconds[name], strict=True)) - 1

    rows = [
        row("training loop over the bare model step", added("loop", "bare"), "ratio", 0.03, "lower"),
        row("… of which the DeepSpeed engine", added("deepspeed", "bare"), "ratio"),
        row("training loop over the bare engine", added("loop", "deepspeed"), "ratio"),
        *(row(f"seconds a step, {name}", medians[name], "s", better="lower") for name in SIDES),
    ]
    table.show(rows)
    if arguments.json:
        table.write(
            arguments.json,
            rows,
            hardware=f"{table.processor()}, {arguments.threads} threads; no GPU was at hand",
            versions={name: version(name) for name in ("torch", "deepspeed", "nvidia-dali-cuda130")},
            command="python -m benchmarks.engine",
            setting=f"SEW-ResNet34, 224 x 224, T=4, bf16, one rank, {SETTING}, {arguments.steps} steps a turn",
            seconds=seconds,
        )


if __name__ == "__main__":
    main()
