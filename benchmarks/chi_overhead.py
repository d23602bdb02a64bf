"""What χ costs: a whole training step that measures, reduces and steers, against the same step without χ.

    python -m benchmarks.chi_overhead [--quick] [--image-size 224] [--pairs 12] [--json FILE]

SEW-ResNet34, T = 4, bf16, ZeRO-1, an effective batch of 32 in micro-batches of 4. Three engines with the same weights,
one with χ and two without, run in one process and step in turn; their order changes from step to step. The overhead is
the median of the ratios of neighbouring steps. The same median for the two engines without χ shows the error of this
method. The wall time inside χ's own calls is reported too. A profiled step counts collectives and reads by the host.
"""

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from benchmarks import table
from benchmarks.table import row
from pipeline.chi import comm_hook
from pipeline.chi.comm_hook import Limbs
from pipeline.chi.tap import Tap
from pipeline.chi.widths import Widths
from pipeline.config import ChiConfig, Config, DataConfig, ModelConfig, TrainConfig
from pipeline.engine.engine import build
from pipeline.ranks.group import join, leave
from pipeline.snn import losses
from pipeline.snn.networks.build import build as build_network
from pipeline.snn.neurons import bind

MICRO, ACCUMULATION = 4, 8


class Side:
    """An engine that trains on synthetic images, with χ or without."""

    def __init__(self, config: Config, image_size: int, with_chi: bool) -> None:
        torch.manual_seed(0)
        network = build_network(config.model, num_classes=1000, image_size=image_size)
        self.config, self.engine, self.with_chi = config, build(config, network, 1), with_chi
        self.own_s = 0.0
        """Seconds inside χ's own calls so far."""
        if with_chi:
            self.neurons, layers = bind(network), network.spiking_layers()
            self.tap = Tap(self.engine, layers, self.neurons)
            sums = comm_hook.sums_of_each
            comm_hook.sums_of_each = lambda gradients: self.timed(sums, gradients)
            self.widths = Widths(config.chi, layers, self.neurons)
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(MICRO, 3, image_size, image_size, generator=generator).bfloat16()
        self.labels = torch.randint(1000, (MICRO,), generator=generator)

    def step(self) -> float:
        """Seconds of one optimizer step."""
        began = time.perf_counter()
        for _ in range(ACCUMULATION):
            logits = self.engine(self.images)
            loss: Tensor = losses.cross_entropy(logits, self.labels)
            if self.with_chi:
                self.timed(self.tap.observe, loss, logits, self.labels)
            self.engine.backward(loss)
            if self.with_chi:
                self.timed(self.tap.check)
            self.engine.step()
        if self.with_chi:
            self.timed(self._steer)
        return time.perf_counter() - began

    def timed(self, call: Callable, *arguments: object) -> Any:
        """Runs `call` and returns its result; its time is added to `own_s`."""
        began = time.perf_counter()
        result = call(*arguments)
        self.own_s += time.perf_counter() - began
        return result

    def _steer(self) -> None:
        self.widths.step(self.tap.read().indicators, 0.5)

    def count(self) -> Counter:
        """Collectives and host reads of one step."""
        with torch.profiler.profile() as profile:
            self.step()
        return Counter({event.key: event.count for event in profile.key_averages()})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="4 pairs of steps at 64 x 64")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--pairs", type=int, default=12, help="pairs of steps")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    image_size, pairs = (64, 4) if arguments.quick else (arguments.image_size, arguments.pairs)
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_PORT", "29533")
    config = Config(
        recipe="overhead",
        data=DataConfig(global_batch=MICRO * ACCUMULATION, micro_batch=MICRO, image_size=image_size),
        model=ModelConfig(arch="sew_resnet34"),
        chi=ChiConfig(self_check=False),
        train=TrainConfig(precision="bf16", zero_stage=1),
    )
    join(config)
    sides = {name: Side(config, image_size, name == "with chi") for name in ("without", "with chi", "without, again")}
    for side in sides.values():
        side.step()
        side.own_s = 0.0
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(pairs):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            seconds[name].append(sides[name].step())
        print(", ".join(f"{name} {values[-1]:.3f} s" for name, values in seconds.items()), flush=True)
    own = sides["with chi"].own_s / sum(seconds["with chi"])
    added = sides["with chi"].count() - sides["without"].count()
    rows = rows_of(seconds, own, added, sides["with chi"])
    table.show(rows)
    if arguments.json:
        table.write(
            arguments.json,
            rows,
            hardware=f"{table.processor()}, {torch.get_num_threads()} threads; no GPU was at hand",
            versions={name: version(name) for name in ("torch", "deepspeed")},
            command=f"python -m benchmarks.chi_overhead --image-size {image_size} --pairs {pairs}",
            setting=f"SEW-ResNet34, T=4, {image_size} x {image_size}, bf16, ZeRO-1, batch {MICRO} x {ACCUMULATION}",
            seconds=seconds,
        )
    leave()


def rows_of(seconds: dict[str, list[float]], own: float, added: Counter, side: Side) -> list[dict]:
    def against_without(name: str) -> float:
        ratios = [a / b for a, b in zip(seconds[name], seconds["without"], strict=True)]
        return 100 * (statistics.median(ratios) - 1)

    collectives = sum(count for name, count in added.items() if name.startswith("c10d::"))
    tail = 4 * (Limbs(1).pack(side.tap._share().counts).numel() + 1)  # the counts' limbs, and the loss
    return [
        row("overhead of χ over a whole training step", against_without("with chi"), "%", 1.0, "lower"),
        row("… of nothing, measured in the same way", against_without("without, again"), "%"),
        row("time inside χ's own calls, of a whole step", 100 * own, "%", 1.0, "lower"),
        row("collectives added per step", collectives, "calls", 0, "lower"),
        row(
            "host reads added per step, by measuring and steering",
            added["aten::_local_scalar_dense"],
            "reads",
            0,
            "lower",
        ),
        row("traffic added per step", tail / len(side.neurons.names), "B/layer", 64, "lower"),
        row("seconds of a step without χ", statistics.median(seconds["without"]), "s"),
    ]


if __name__ == "__main__":
    main()
