"""Training step of SEW-ResNet against SpikingJelly 2.0, on the CPU: images/s, peak memory, share of the matrix rate.

    python -m benchmarks.train_step [--quick] [--json FILE] [--peer PYTHON]

Each side has its own process, as peak memory is measured per process. All have the same weights, images and optimizer.
They step in turn, so that a busy moment of the machine affects all sides; medians are compared. The peer's environment
is made on first use under build/peer, unless --peer names a Python that has torch and spikingjelly 2.0.0.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import table
from benchmarks.side import Side, peer_python

SIDES = ("peer", "ours", "ours, not counting", "ours, checkpoint")
GFLOP_PER_IMAGE = 2 * (3 * (3.664 - 0.118) * 4 + 2 * 0.118)
"""Executed by our side for one image at T=4. Of 3.664 GMAC a step, those after the stem run 4 times and cost 3 times as
much with the backward pass; the stem's 0.118 GMAC run once and need no gradient for the images."""
CONVOLUTIONS = ("aten::convolution_backward", "aten::mkldnn_convolution")


class Trainer(Side):
    """A process that trains one step when asked."""

    def __init__(self, python: str, job: dict) -> None:
        super().__init__(python, "train_step_side.py", job)
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peak_bytes = 0

    def step(self) -> None:
        answer = self.ask("step")
        self.seconds.append(answer["seconds"])
        self.losses.append(answer["loss"])
        self.peak_bytes = answer["peak_bytes"]

    def profile(self) -> dict[str, float]:
        """Seconds of one more step, by operation."""
        return self.ask("profile")


def matrix_rate(threads: int) -> float:
    """bf16 matrix products of this machine, in FLOP/s: the best of ten 2048-cubed ones."""
    import torch

    torch.set_num_threads(threads)
    a, b = (torch.randn(2048, 2048).bfloat16() for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Trainer], dict[str, dict[str, float]]]:
    """Warms up every side with two steps, then steps them in turn; last, profiles one more step of each."""
    weights = str(folder / "weights.pt")
    base = {"arch": "sew_resnet34", "T": 4, "batch": 4, "size": 224, "threads": arguments.threads}
    peer = peer_python(arguments.peer)
    sides: dict[str, Trainer] = {}
    try:
        for name in SIDES:
            first = not sides
            job = {**base, "side": name, "save": weights if first else "", "weights": "" if first else weights}
            sides[name] = Trainer(peer if name == "peer" else sys.executable, job)
        for _ in range(2 + arguments.rounds):
            for name in SIDES:
                sides[name].step()
        profiles = {name: sides[name].profile() for name in SIDES[:2]}
    finally:
        for side in sides.values():
            side.close()
    return sides, profiles


def rows(sides: dict[str, Trainer], profiles: dict[str, dict[str, float]], rate: float) -> list[dict]:
    """The table of the benchmark."""
    median = {name: statistics.median(side.seconds[2:]) for name, side in sides.items()}
    # Neighbouring steps see the same machine load: the median of their ratios is steadier than a ratio of medians.
    pairs = zip(sides["peer"].seconds[2:], sides["ours"].seconds[2:], strict=True)
    counting = zip(sides["ours"].seconds[2:], sides["ours, not counting"].seconds[2:], strict=True)
    work = GFLOP_PER_IMAGE * 1e9 * 4
    arithmetic = sum(profiles["ours"].get(name, 0.0) for name in CONVOLUTIONS)
    checkpoint = zip(sides["ours, checkpoint"].seconds[2:], sides["ours"].seconds[2:], strict=True)
    figures = [
        ("speed, ratio to the peer", statistics.median(a / b for a, b in pairs), "ratio", 1.7, "higher"),
        ("… if all but our convolutions were free", median["peer"] / arithmetic, "ratio", None, "higher"),
        ("images/s", 4 / median["ours"], "images/s", None, "higher"),
        ("images/s, peer", 4 / median["peer"], "images/s", None, "higher"),
        (
            "peak resident memory, ratio to the peer",
            sides["ours"].peak_bytes / sides["peer"].peak_bytes,
            "ratio",
            0.6,
            "lower",
        ),
        ("peak resident memory", sides["ours"].peak_bytes, "bytes", None, "lower"),
        ("peak resident memory, peer", sides["peer"].peak_bytes, "bytes", None, "lower"),
        ("peak resident memory, model.checkpoint", sides["ours, checkpoint"].peak_bytes, "bytes", None, "lower"),
        ("time, model.checkpoint to without", statistics.median(a / b for a, b in checkpoint), "ratio", None, "lower"),
        ("share of the bf16 matrix rate", work / median["ours"] / rate, "ratio", 0.3, "higher"),
        ("bf16 matrix rate", rate, "FLOP/s", None, "higher"),
        ("cost of counting", statistics.median(a / b for a, b in counting) - 1, "ratio", 0.005, "lower"),
        ("loss of the first step", sides["ours"].losses[0], "nats", None, "lower"),
        ("loss of the first step, peer", sides["peer"].losses[0], "nats", None, "lower"),
    ]
    return [table.row(*figure) for figure in figures]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 15")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--peer", metavar="PYTHON", help="a Python that has torch and spikingjelly 2.0.0")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    arguments.rounds = 3 if arguments.quick else 15
    rate = matrix_rate(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        sides, profiles = measure(arguments, Path(folder))
    # The better of two, before and after: a busy moment must not make the share look better.
    rate = max(rate, matrix_rate(arguments.threads))
    lines = rows(sides, profiles, rate)
    table.show(lines)
    if arguments.json:
        table.write(
            arguments.json,
            lines,
            hardware=f"{table.processor()}, {arguments.threads} threads of {os.cpu_count()} cores; no GPU was at hand",
            versions={"torch": sides["ours"].torch, "spikingjelly": "2.0.0"},
            command="python -m benchmarks.train_step" + (" --quick" if arguments.quick else ""),
            setting="SEW-ResNet34, T=4, batch 4, 224 x 224, bf16 autocast, forward + backward + SGD with momentum",
            profile_seconds=profiles,
            seconds={name: side.seconds for name, side in sides.items()},
        )


if __name__ == "__main__":
    main()
