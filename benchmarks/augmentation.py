"""What each augmentation costs the loader on the CPU, beside the loader without it.

    python -m benchmarks.augmentation [--quick] [--json FILE]

Images and method are those of benchmarks/loader.py: 224² random-resized crops of ilsvrc-mini; every round runs each
side in turn on the same cores, after warm-up, and a ratio is the median of the rounds' ratios. The CPU time an image
counts all threads, so other work on the machine disturbs it less than the speed.
"""

import argparse
import os
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path

from benchmarks import table
from benchmarks.loader import PACKAGES, timed, write_images
from benchmarks.loader_sides import ours
from benchmarks.table import row

SIDES: dict[str, dict] = {
    "none": {},
    "aa=ta_wide": {"aa": "ta_wide"},
    "aa=rand-m9-mstd0.5-inc1": {"aa": "rand-m9-mstd0.5-inc1"},
    "color_jitter=0.4": {"color_jitter": 0.4},
    "reprob=0.25": {"reprob": 0.25},
    "mixup=0.2": {"mixup": 0.2},
    "cutmix=1": {"cutmix": 1.0},
    "ta_wide, reprob, mixup, cutmix": {"aa": "ta_wide", "reprob": 0.25, "mixup": 0.2, "cutmix": 1.0},
}
BATCHES = 12


def compare(folder: Path, threads: int, rounds: int) -> list[dict]:
    """Speed and CPU time of each side."""
    write_images(folder)
    speeds: dict[str, list[float]] = {name: [] for name in SIDES}
    spent: dict[str, list[float]] = {name: [] for name in SIDES}
    for number in range(rounds):
        for name in SIDES if number % 2 == 0 else reversed(SIDES):
            got = timed(ours(str(folder), threads, **SIDES[name]), BATCHES)
            speeds[name].append(got["images_per_s"])
            spent[name].append(1e6 * sum(got["cpu_s_per_image"].values()))
            print(f"round {number + 1}: {name}: {speeds[name][-1]:.0f} images/s", flush=True)
    rows = []
    for name in SIDES:
        rows.append(row(f"images/s, {name}", statistics.median(speeds[name]), "images/s"))
        if SIDES[name]:
            ratio = statistics.median(a / b for a, b in zip(speeds[name], speeds["none"], strict=True))
            rows.append(row("… speed against none", ratio, "ratio"))
        rows.append(row("… CPU time an image", statistics.median(spent[name]), "µs"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="1 round instead of 3")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        rows = compare(Path(name), threads, 1 if arguments.quick else 3)
    table.show(rows)
    if arguments.json:
        table.write(
            arguments.json,
            rows,
            hardware=f"{table.processor()}, {threads} of {os.cpu_count()} cores; no GPU was at hand",
            versions={name: version(name) for name in PACKAGES},
            command="python -m benchmarks.augmentation" + (" --quick" if arguments.quick else ""),
            setting="ilsvrc-mini's 400 training images over and over, 224² random-resized crops, batches of 64",
        )


if __name__ == "__main__":
    main()
