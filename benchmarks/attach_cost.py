"""What `chi.attach` costs in a script of one's own: training steps with it beside the same steps without it.

    python -m benchmarks.attach_cost [--quick] [--pairs 12] [--json FILE]

A convolutional network for CIFAR's image size, T = 4, batch 16, fp32, SGD with momentum, in SpikingJelly (multi-step
and single-step) and with our own neurons. Copies of one network step in turn, in an order that changes from step to
step: with SpikingJelly's own triangle, with `chi.prepare` (twice: the difference is the error of this method), and with
`chi.prepare` and `chi.attach`. A figure is the median over the ratios of neighbouring steps.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor, nn

from benchmarks import table
from benchmarks.table import row
from benchmarks.train_step_side import peer_packages
from pipeline import chi
from pipeline.snn.kernels.reference import Rule
from pipeline.snn.neurons import Neuron

T, BATCH, SIZE, CLASSES = 4, 16, 32, 10
CHANNELS = (64, 64, 128, 128, 256, 256)
KINDS = ("spikingjelly m", "spikingjelly s", "ours")


class Net(nn.Module):
    """Six convolutions with batch normalisation and neurons, pooled after every second; images → (T, N, 10)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.functional, layer, neuron, surrogate, _ = peer_packages()
        ours = kind == "ours"
        convolution, norm, pool = (
            getattr(nn if ours else layer, name) for name in ("Conv2d", "BatchNorm2d", "AvgPool2d")
        )
        self.stages, before = nn.ModuleList(), 3
        for index, channels in enumerate(CHANNELS):
            spikes = Neuron(Rule()) if ours else neuron.IFNode(
                surrogate_function=surrogate.PiecewiseQuadratic(alpha=1.0), detach_reset=True
            )  # fmt: skip
            parts = [convolution(before, channels, 3, padding=1, bias=False), norm(channels), spikes]
            self.stages.append(nn.Sequential(*parts, *([pool(2)] if index % 2 else [])))
            before = channels
        self.head = nn.Linear(before, CLASSES)
        if not ours:
            self.functional.set_step_mode(self.stages, kind[-1])

    def forward(self, images: Tensor) -> Tensor:
        if self.kind == "ours":
            x = images.repeat(T, 1, 1, 1)
            for stage in self.stages:
                for part in stage:  # pyright: ignore[reportGeneralTypeIssues]
                    x = part(x.unflatten(0, (T, -1))).flatten(0, 1) if isinstance(part, Neuron) else part(x)
            return self.head(x.mean((2, 3))).unflatten(0, (T, -1))
        self.functional.reset_net(self)
        if self.kind[-1] == "m":
            return self.head(self.through(images.expand(T, *images.shape)).mean((3, 4)))
        return torch.stack([self.head(self.through(images).mean((2, 3))) for _ in range(T)])

    def through(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


class Side:
    """A copy of the script, with its own network and optimizer."""

    def __init__(self, kind: str, *, prepared: bool, attached: bool) -> None:
        torch.manual_seed(0)
        self.net = Net(kind)
        if prepared:
            chi.prepare(self.net)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9)
        self.pilot = chi.attach(self.net, self.optimizer, steps=10_000) if attached else None
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
        self.labels = torch.randint(CLASSES, (BATCH,), generator=generator)

    def step(self) -> float:
        """Seconds of one optimizer step."""
        began = time.perf_counter()
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.net(self.images).mean(0), self.labels).backward()
        self.optimizer.step()
        return time.perf_counter() - began


def measure(kind: str, pairs: int) -> dict[str, float]:
    """Median seconds, and ratios of neighbouring steps."""
    sides = {
        "prepared": Side(kind, prepared=True, attached=False),
        "prepared again": Side(kind, prepared=True, attached=False),
        "attached": Side(kind, prepared=True, attached=True),
    }
    if kind != "ours":
        sides["theirs"] = Side(kind, prepared=False, attached=False)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    order = random.Random(0)
    for number in range(pairs + 2):
        for name in order.sample(list(sides), len(sides)):
            took = sides[name].step()
            if number > 1:
                seconds[name].append(took)
    ratio: Callable[[str, str], float] = lambda one, other: statistics.median(  # noqa: E731
        a / b for a, b in zip(seconds[one], seconds[other], strict=True)
    )
    found = {
        "step without attach": statistics.median(seconds["prepared"]),
        "attach": ratio("attached", "prepared"),
        "error of the method": ratio("prepared again", "prepared"),
    }
    if "theirs" in sides:
        found["prepare and attach beside the script as it was"] = ratio("attached", "theirs")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two pairs, one thread")
    parser.add_argument("--pairs", type=int, default=12, help="steps of every copy")
    parser.add_argument("--json", metavar="FILE", help="write the table there too")
    arguments = parser.parse_args()
    rows = []
    for threads in (1,) if arguments.quick else (1, torch.get_num_threads()):
        torch.set_num_threads(threads)
        for kind in KINDS:
            for name, value in measure(kind, 2 if arguments.quick else arguments.pairs).items():
                unit = "s" if name.startswith("step") else "ratio"
                goal = 1.03 if name == "attach" else None
                rows.append(row(f"{kind}, {threads} threads: {name}", value, unit, goal, "lower"))
    table.show(rows)
    if arguments.json:
        table.write(
            arguments.json,
            rows,
            hardware=f"{table.processor()}, {torch.get_num_threads()} threads; no GPU was at hand",
            versions={name: version(name) for name in ("torch", "spikingjelly")},
            command="python -m benchmarks.attach_cost --json FILE",
            setting=f"six convolutions {CHANNELS}, {SIZE}x{SIZE}, T={T}, batch {BATCH}, fp32; medians of pairs",
        )


if __name__ == "__main__":
    main()
