"""What χ costs: a whole training step with measuring, reducing and steering against the same step without.

    python -m benchmarks.chi_overhead [--quick] [--json FILE]

SEW-ResNet34, T = 4, bf16, ZeRO-1, an effective batch of 32 in micro-batches of 4. Two engines of the same weights stand
side by side in one process and take their steps in turn, the order changing from step to step; the overhead is the
median of neighbouring ratios. A profiled step of each counts collectives, and places where the host waits for a value.
"""

import argparse
import os
import statistics
import time
from collections import Counter
from importlib.metadata import version

import torch
from torch import Tensor

from benchmarks import table
from benchmarks.table import row
from pipeline.chi.allreduce import Tap
from pipeline.chi.controller import start, steer
from pipeline.chi.limbs import pack
from pipeline.chi.spread import Spread
from pipeline.config import ChiConfig, Config, DataConfig, ModelConfig, TrainConfig
from pipeline.engine import build, join, leave
from pipeline.snn import readout, sew_resnet
from pipeline.snn.neurons import bind

MICRO, ACCUMULATION = 4, 8


class Side:
    """An engine that trains on made-up images, with χ or without."""

    def __init__(self, config: Config, image_size: int, with_chi: bool) -> None:
        torch.manual_seed(0)
        network = sew_resnet.build(config.model, num_classes=1000, image_size=image_size)
        self.config, self.engine, self.with_chi = config, build(config, network, 1), with_chi
        if with_chi:
            self.neurons, layers = bind(network), network.spiking_layers()
            self.tap = Tap(self.engine, layers, self.neurons)
            self.spread = Spread(config.chi, layers, self.neurons)
            self.controller = start(len(layers), config.model.width, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(MICRO, 3, image_size, image_size, generator=generator).bfloat16()
        self.labels = torch.randint(1000, (MICRO,), generator=generator)

    def step(self) -> float:
        """Seconds of one optimizer step."""
        began = time.perf_counter()
        for _ in range(ACCUMULATION):
            logits = self.engine(self.images)
            loss: Tensor = readout.cross_entropy(logits, self.labels)
            if self.with_chi:
                self.tap.observe(loss, logits, self.labels)
            self.engine.backward(loss)
            if self.with_chi:
                self.tap.check()
            self.engine.step()
        if self.with_chi:
            self._steer()
        return time.perf_counter() - began

    def _steer(self) -> None:
        evidence = self.spread.evidence(self.tap.read().indicators)
        self.controller, _ = steer(self.config.chi, self.controller, evidence, 0.5)
        self.neurons.widths.copy_(self.controller.widths)

    def count(self) -> Counter:
        """Collectives and host reads of one step."""
        with torch.profiler.profile() as profile:
            self.step()
        return Counter({event.key: event.count for event in profile.key_averages()})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="4 pairs of steps at 64 x 64 instead of 12 at 224 x 224")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    image_size, pairs = (64, 4) if arguments.quick else (224, 12)
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
    sides = {True: Side(config, image_size, True), False: Side(config, image_size, False)}
    for side in sides.values():
        side.step()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(pairs):
        for with_chi in (turn % 2 == 0, turn % 2 == 1):
            seconds[with_chi].append(sides[with_chi].step())
        print(f"pair {turn + 1}: with χ {seconds[True][-1]:.3f} s, without {seconds[False][-1]:.3f} s", flush=True)
    counts = {with_chi: side.count() for with_chi, side in sides.items()}
    rows = rows_of(seconds, counts, sides[True])
    table.show(rows)
    if arguments.json:
        table.write(
            arguments.json,
            rows,
            hardware=f"{table.processor()}, {torch.get_num_threads()} threads; no GPU was at hand",
            versions={name: version(name) for name in ("torch", "deepspeed")},
            command="python -m benchmarks.chi_overhead" + (" --quick" if arguments.quick else ""),
            setting=f"SEW-ResNet34, T=4, {image_size} x {image_size}, bf16, ZeRO-1, batch {MICRO} x {ACCUMULATION}",
            seconds={"with chi": seconds[True], "without": seconds[False]},
        )
    leave()


def rows_of(seconds: dict[bool, list[float]], counts: dict[bool, Counter], side: Side) -> list[dict]:
    ratios = [on / off for on, off in zip(seconds[True], seconds[False], strict=True)]
    added = counts[True] - counts[False]
    collectives = sum(count for name, count in added.items() if name.startswith("c10d::"))
    tail = 4 * (pack(side.tap._share().counts).numel() + 1)  # the counts' limbs, and the loss
    fastest = 100 * (min(seconds[True]) / min(seconds[False]) - 1)
    return [
        row("overhead of χ over a whole training step", 100 * (statistics.median(ratios) - 1), "%", 1.0, "lower"),
        row("… the fastest steps compared", fastest, "%", None, "lower"),
        row("collectives added per step", collectives, "calls", 0, "lower"),
        row("host reads added per step", added["aten::_local_scalar_dense"], "reads", 0, "lower"),
        row("traffic added per step", tail / len(side.neurons.names), "B/layer", 64, "lower"),
        row("seconds of a step without χ", statistics.median(seconds[False]), "s"),
    ]


if __name__ == "__main__":
    main()
