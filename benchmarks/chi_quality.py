"""Which width gives a run the best gradient? Measured on its own checkpoints and data; see pipeline/chi/quality.py.

    python -m benchmarks.chi_quality RUN [--widths 0.5 1 2] [--groups 3] [--checkpoint STEP …] [--plot FILE]

For each checkpoint: how much faster (+) or slower (-) the loss falls than along the gradient of the run's own widths,
where every layer, or every layer of one group in depth, has one of the widths instead. A star marks a change that is
not chance: p < 0.05 by Student's t with all comparisons at this checkpoint counted (Bonferroni). The gradient's images
come from the training split without augmentation, the loss's from the validation split, which starts again where it is
short of them. Arithmetic is fp32 (fp64 for a run in fp64), whatever the run has.
"""

import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from scipy import stats

from launch import command
from pipeline.chi import quality
from pipeline.config import Config
from pipeline.data.loader import evaluation_batches
from pipeline.data.manifest import EVALUATION, TRAIN
from pipeline.engine import load_network
from pipeline.errors import ConfigError
from pipeline.run_dir import checkpoint_files, run_folder
from pipeline.snn import losses, neurons

BATCHES = 16
WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
ALL = "all layers"
CHANCE = 0.05
"""Probability that any of a checkpoint's changes is marked by chance."""


class Row(NamedTuple):
    """One candidate at one checkpoint."""

    step: int
    group: str
    width: float | None
    """None: the run's own widths, which the others are compared with."""
    descent: float
    """D, mean over the batches, in nats per unit of relative change of the weights."""
    change: float
    """D over that of the run's own widths, minus 1."""
    error: float
    """Standard error of `change`."""
    sure: bool
    """Whether `change` is not chance."""
    cosine: float
    """Between gradients of different batches."""


def groups_of(num_layers: int, count: int) -> dict[str, slice]:
    """`count` groups of consecutive layers, as equal as can be, by name."""
    bounds = [round(g * num_layers / count) for g in range(count + 1)]
    names = ("early", "middle", "late") if count == 3 else [f"{g + 1} of {count}" for g in range(count)]
    return {
        f"{name} layers ({a + 1} to {b})": slice(a, b)
        for name, (a, b) in zip(names, itertools.pairwise(bounds), strict=True)
    }


def batches_of(config: Config, split: str, size: int, count: int) -> Iterator[quality.Batch]:
    """The first batches of `size` valid samples of a split, `count` or all there are; shards are in random order."""
    images = labels = None
    stream = evaluation_batches(
        config.data, rank=0, world_size=1, device=torch.device("cpu"), split=split, T=config.model.T
    )
    try:
        for batch in stream:
            new = batch.images[..., batch.valid, :, :, :], batch.labels[batch.valid]
            images = new[0] if images is None else torch.cat((images, new[0]), -4)
            labels = new[1] if labels is None else torch.cat((labels, new[1]))
            while len(labels) >= size and count:
                yield images[..., :size, :, :, :], labels[:size]
                images, labels, count = images[..., size:, :, :, :], labels[size:], count - 1
            if not count:
                return
    finally:
        stream.close()


def pairs_of(config: Config, options) -> list[tuple[quality.Batch, quality.Batch]]:
    """Batches of the training split, --batches or what there is, each with one of the validation split."""
    wanted = options.batches or BATCHES
    seen, unseen = (list(batches_of(config, split, options.batch, wanted)) for split in (TRAIN, EVALUATION))
    if len(seen) < (options.batches or 2) or not unseen:
        raise ConfigError(
            f"the splits of {config.data.path} have {len(seen)} and {len(unseen)} batches of {options.batch} images; "
            f"{options.batches or 2} and 1 are needed: use a smaller --batch or --batches"
        )
    return list(zip(seen, itertools.cycle(unseen), strict=False))


def look(stored: run_folder.Stored, step: int, batches: list, options) -> list[Row]:
    """Every row of the checkpoint after `step`."""
    saved = checkpoint_files.load_step(options.run, step)
    trained = load_network.load(options.run, stored.config, step=step, weights="last")
    network, own = trained.network, saved["widths"]["log_width"].exp().float()
    without = [layer.name for layer in network.spiking_layers() if layer.weight is None]
    if without:
        raise ConfigError(f"no weight feeds {without[0]} alone, so there is no step along its gradient to measure")
    state = neurons.bind(network)
    state.amplitudes.copy_(saved["widths"]["amplitudes"])
    groups = groups_of(len(own), min(options.groups, len(own)))
    tried = [("the run's own", None), *itertools.product((ALL, *groups), options.widths)]
    table = own.repeat(len(tried), 1)
    for widths, (group, width) in zip(table[1:], tried[1:], strict=True):
        widths[groups.get(group, slice(None))] = width
    dtype = next(network.parameters()).dtype
    found = quality.measure(
        network,
        state,
        [layer.weight for layer in network.spiking_layers() if layer.weight is not None],
        table,
        [((a.to(dtype), b), (c.to(dtype), d)) for (a, b), (c, d) in batches],
        lambda logits, labels: losses.loss(stored.config.train, logits, labels),
    )
    change, error = quality.relative(found.descent)
    # Two-sided, over all candidates but the run's own.
    limit = float(stats.t.ppf(1 - CHANCE / 2 / (len(tried) - 1), len(batches) - 1))
    columns = (found.descent.mean(1), change, error, change.abs() > limit * error, found.cosine.mean(1))
    rows = zip(tried, *(column.tolist() for column in columns), strict=True)
    return [Row(step, group, width, *figures) for (group, width), *figures in rows]


def show(rows: list[Row]) -> None:
    """One checkpoint's table, and what it says."""
    own, others = rows[0], rows[1:]
    print(f"after step {own.step}: the run's own widths give D = {own.descent:.3g}, cosine {own.cosine:.2f}")
    if math.isnan(own.change):
        print("  the loss does not surely fall along this gradient, so widths cannot be compared; use more --batches")
        return
    widths = sorted({row.width for row in others if row.width is not None})
    print(f"  {'D against that, %':28}" + "".join(f"{width:>12g}" for width in widths))
    for group in dict.fromkeys(row.group for row in others):
        cells = {row.width: f"{said(row)}{'*' if row.sure else ' '}" for row in others if row.group == group}
        print(f"  {group:28}" + "".join(f"{cells[width]:>12}" for width in widths))
    better = [row for row in others if row.sure and row.change > 0]
    best = max(better, key=lambda row: row.change, default=None)
    print(f"  best: {best.group} at {best.width:g}, {said(best)} %" if best else "  no width tried is surely better")


def said(row: Row) -> str:
    return f"{100 * row.change:+.0f} ± {100 * row.error:.0f}"


def draw(rows: list[Row], path: str) -> None:
    """Change of D over the width; one panel a group, one line a checkpoint."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row.group for row in rows if row.width is not None))
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.6), layout="constrained", sharey=True)
    steps = sorted({row.step for row in rows})
    for panel, name in zip(axes, names, strict=True):
        for number, step in enumerate(steps):
            line = [row for row in rows if row.step == step and row.group == name]
            panel.errorbar(
                [row.width for row in line],
                [100 * row.change for row in line],
                [200 * row.error for row in line],
                fmt="o-", capsize=3, color=plt.get_cmap("viridis")(number / max(1, len(steps))),
                label=f"step {step}",
            )  # fmt: skip
        widths = sorted({row.width for row in rows if row.width is not None})
        panel.axhline(0, color="0.6", linewidth=1)
        panel.set_xscale("log", base=2)
        panel.set_xticks(widths, [f"{width:g}" for width in widths], fontsize=8)
        panel.minorticks_off()
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("width")
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("descent against the run's own widths, %\n(bars: two standard errors)")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def finite(row: Row) -> dict:
    """A row for JSON: what could not be compared is null."""
    return {name: None if value != value else value for name, value in row._asdict().items()}


def checked(options) -> run_folder.Stored:
    """The run, once the command line fits it."""
    if any(not 0 < width < float("inf") for width in options.widths):
        raise ConfigError(f"--widths {options.widths} are not allowed; use numbers above 0")
    for name, least in (("groups", 1), ("batches", 2), ("batch", 2), ("threads", 1)):
        if (given := getattr(options, name)) is not None and given < least:
            raise ConfigError(f"--{name} {given} is not allowed; use {least} or more")
    stored = run_folder.read(options.run)
    if stored.config.model.scale == "rms":
        raise ConfigError("model.scale='rms' cannot be measured: its amplitudes follow the widths only while training")
    steps = checkpoint_files.saved_steps(options.run)
    if not steps:
        raise ConfigError(f"{options.run} has no whole checkpoint; the first comes after train.checkpoint_every steps")
    options.checkpoint = options.checkpoint or steps
    return stored


def measure(arguments: list[str]) -> None:
    parser = command.Parser(prog="python -m benchmarks.chi_quality", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, finished or not: runs/digits")
    parser.add_argument("--widths", type=float, nargs="+", default=list(WIDTHS), help="in units of the potential")
    parser.add_argument("--groups", type=int, default=3, help="of layers, by depth [3]")
    parser.add_argument("--checkpoint", type=int, nargs="+", metavar="STEP", help="after these steps [all there are]")
    parser.add_argument("--batches", type=int, help=f"pairs of batches [{BATCHES}, or what the training split has]")
    parser.add_argument("--batch", type=int, default=64, help="images in each [64]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--plot", metavar="FILE")
    parser.add_argument("--json", metavar="FILE", help="write every row here")
    options = parser.parse_args(arguments)
    stored = checked(options)
    torch.set_num_threads(options.threads)
    pairs = pairs_of(stored.config, options)
    rows: list[Row] = []
    for step in options.checkpoint:
        found = look(stored, step, pairs, options)
        show(found)
        rows += found
    if options.plot:
        draw(rows, options.plot)
    if options.json:
        run_folder.write_json(Path(options.json), {"rows": [finite(row) for row in rows]})


def main() -> None:
    sys.exit(command.run(measure))


if __name__ == "__main__":
    main()
