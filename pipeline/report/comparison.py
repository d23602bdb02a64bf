"""Several run folders → one page: their curves in one picture, what differs in their settings, their results."""

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from pipeline.config.config_json import flatten
from pipeline.metrics.console import rate_decimals
from pipeline.metrics.journal import layer_labels, read_journal
from pipeline.report import page
from pipeline.run_dir.run_folder import FREE

COMPARED = {"layer_surrogate_width": 3, "layer_coverage_ratio": 3, "layer_chi": 3}
"""What is compared by layer, and its decimals in the table."""
SMOOTHING = 0.05  # share of the logged steps: the window of a training curve's running mean


class Run(NamedTuple):
    name: str
    colour: str
    config: dict
    """Flat: `{"optim.lr": 0.1}`."""
    about: dict
    training: list[dict]
    evaluations: list[dict]


def write(folders: Sequence[Path], path: Path) -> Path:
    """Writes the page of these runs; each must have a logged step."""
    runs = read(folders)
    head = [f'<span style="color: {run.colour}">■</span> {html.escape(run.name)}' for run in runs]
    differing = differences(runs)
    layers = (
        "<p>Maps of one indicator have one scale, whatever the run. The table has the last logged step of each run.</p>"
    )
    text = page.document(
        f"{len(runs)} runs",
        "<h2>Results</h2>",
        page.columns(head, results(runs)),
        "<h2>What differs</h2>",
        page.columns(head, differing)
        if differing
        else "<p>Nothing: settings, data, versions and commit are the same.</p>",
        "<h2>Learning</h2>",
        "<p>Training in thin lines, a running mean over the values of single batches; validation in dots. Then, of all "
        "spiking layers, the mean firing rate and the geometric mean of the surrogates' widths.</p>",
        f"<p>{' &nbsp; '.join(head)}</p>",
        page.gallery(curves(runs)),
        "<h2>Layers</h2>",
        layers,
        *(page.gallery(layer_maps(runs, name)) for name in COMPARED),
        layer_table(runs, head),
    )
    return page.write(path, text)


def read(folders: Sequence[Path]) -> list[Run]:
    """The runs in the order given, each with a name and a colour of its own."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    palette = plt.get_cmap("tab10" if len(folders) <= 10 else "turbo")
    colours = palette(np.arange(len(folders)) if len(folders) <= 10 else np.linspace(0, 1, len(folders)))
    runs = []
    for folder, name, colour in zip(folders, names, colours, strict=True):
        journal = read_journal(folder / "metrics.jsonl")
        runs.append(
            Run(
                name=name,
                colour=to_hex(colour),
                config=flatten(json.loads((folder / "config.json").read_text(encoding="utf-8"))),
                about=json.loads((folder / "run.json").read_text(encoding="utf-8")),
                training=[record for record in journal if "train_loss" in record],
                evaluations=[record for record in journal if "eval_loss" in record],
            )
        )
    return runs


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Settings and conditions that differ between the runs; `-` where a run does not have one.

    What changes no result (run_folder.FREE) is left out.
    """
    found = {}
    aside = {"layers", "classes", "num_parameters", "seed"}  # they follow from what is shown
    abouts = [flatten({k: v for k, v in run.about.items() if k not in aside}) for run in runs]
    for sources, free in (([run.config for run in runs], FREE), (abouts, frozenset())):
        for name in dict.fromkeys(name for source in sources for name in source):
            values = [source.get(name, "-") for source in sources]
            if name not in free and any(value != values[0] for value in values):
                found[name] = [_short(value) for value in values]
    return found


def results(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Results of each run, by name."""
    accuracies = [[record["eval_accuracy_ratio"] for record in run.evaluations] or [None] for run in runs]
    last = [run.evaluations[-1] if run.evaluations else {} for run in runs]
    ends = [run.training[-1] for run in runs]
    rates = [[r["train_images_per_second"] for r in run.training] for run in runs]
    waits = [[r["data_wait_ratio"] for r in run.training] for run in runs]
    return {
        "validation accuracy": [_percent(ratios[-1]) for ratios in accuracies],
        "best of its evaluations": [_percent(max(ratios)) for ratios in accuracies],
        "validation loss, nats": [_number(record.get("eval_loss"), 4) for record in last],
        "evaluated after step": [str(record.get("step", "-")) for record in last],
        "last logged step": [str(record["step"]) for record in ends],
        "training loss there, nats": [_number(record["train_loss"], 4) for record in ends],
        "mean firing rate": [_number(_layer_means(run, "layer_firing_rate_ratio")[-1], 3) for run in runs],
        "images/s, median": [_number(rate, rate_decimals(rate)) for rate in map(median, rates)],
        "waiting for data, median": [_percent(median(values)) for values in waits],
        "parameters": [f"{run.about['num_parameters']:,}" for run in runs],
        "ranks": [str(run.about["world_size"]) for run in runs],
    }


def curves(runs: Sequence[Run]) -> dict[str, Figure]:
    """Loss, accuracy, mean firing rate and mean width, a figure each; over images if the global batches differ."""
    by_step = len({run.config["data.global_batch"] for run in runs}) == 1
    panels = {
        name: page.panel()
        for name in ("cross-entropy, nats", "top-1 accuracy, %", "mean firing rate", "mean width of the surrogates")
    }
    loss, accuracy, rate, width = (axes for _, axes in panels.values())
    for run in runs:
        scale = 1 if by_step else run.config["data.global_batch"]
        steps = np.array([record["step"] for record in run.training]) * scale
        at = [record["step"] * scale for record in run.evaluations]
        for axes, key, dots, factor in (
            (loss, "train_loss", "eval_loss", 1),
            (accuracy, "train_accuracy_ratio", "eval_accuracy_ratio", 100),
        ):
            values = factor * _values(run.training, key)
            axes.plot(steps, values, color=run.colour, alpha=0.2, linewidth=0.8)
            axes.plot(steps, running_mean(values), color=run.colour, linewidth=1)
            axes.plot(at, factor * _values(run.evaluations, dots), "o-", color=run.colour, markeredgecolor="white")
        rate.plot(steps, _layer_means(run, "layer_firing_rate_ratio"), color=run.colour)
        width.plot(steps, np.exp(_layer_means(run, "layer_surrogate_width", np.log)), color=run.colour)
    for name, (_, axes) in panels.items():
        axes.set(xlabel="step" if by_step else "images", ylabel=name)
    for axes in (loss, rate):
        axes.set_ylim(bottom=0)
    return {f"{name} of the runs": figure for name, (figure, _) in panels.items()}


def layer_maps(runs: Sequence[Run], name: str) -> dict[str, Figure]:
    """A map of this indicator for each run, with one scale of colours."""
    scale = page.scale_of(name, [page.layer_values(run.training, name) for run in runs])
    return {
        f"{page.LAYER_MAPS[name]} by layer and step, run {number}: {run.name}": page.layer_map(
            run.training, layer_labels(run.about["layers"]), name, scale, of=run.name
        )
        for number, run in enumerate(runs, 1)
    }


def layer_table(runs: Sequence[Run], head: Sequence[str]) -> str:
    """Every layer's values at each run's last logged step, the runs side by side, as HTML; `-` where a run lacks it."""
    labels = [layer_labels(run.about["layers"]) for run in runs]
    rows = {label: [] for label in dict.fromkeys(label for of in labels for label in of)}
    for name, decimals in COMPARED.items():
        for run, of in zip(runs, labels, strict=True):
            values = dict(zip(of, run.training[-1][name], strict=True))
            for label, cells in rows.items():
                cells.append(_number(values.get(label), decimals))
    top = [f"{page.LAYER_MAPS[name]}<br>{run}" for name in COMPARED for run in head]
    return page.columns(top, dict(sorted(rows.items())))


def running_mean(values: np.ndarray) -> np.ndarray:
    """The mean of each value and those just before it; values that are not finite are left out."""
    window = max(1, round(SMOOTHING * len(values)))
    finite = np.isfinite(values)
    total = np.cumsum(np.where(finite, values, 0.0))
    count = np.cumsum(finite)
    total[window:] -= total[:-window].copy()
    count[window:] -= count[:-window].copy()
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _values(records: Sequence[dict], key: str) -> np.ndarray:
    return np.array([record[key] for record in records], dtype=float)


def _layer_means(run: Run, key: str, of=lambda values: values) -> np.ndarray:
    """The mean over layers of each training record; NaN where a layer's value is not defined."""
    return np.array([np.mean(of(np.array(record[key], dtype=float))) for record in run.training])


def _short(value: object) -> str:
    """The value as text: 12 digits of a hash, and 30.0 as 30."""
    if isinstance(value, float):
        return f"{value:g}"
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28,}", r"\1", str(value))


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * ratio:.2f} %"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
