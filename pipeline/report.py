"""A run folder → report.html: one file, pictures inside, opens without a network.

`python -m pipeline.report RUN` makes it at any time, also while the run goes on; with more runs it makes one page that
shows them side by side (comparison.py).
"""

import argparse
import html
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline import caches

os.environ.update(caches.stand_ins(os.environ))  # before matplotlib looks for its home

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from pipeline import comparison
from pipeline.chi import guards
from pipeline.config import ChiConfig
from pipeline.errors import EXIT_DONE, EXIT_INTERNAL, EXIT_USAGE
from pipeline.metrics import layer_labels, read_journal
from pipeline.page import document, picture, points, table

HEATMAPS = {
    "layer_chi": "χ",
    "layer_coverage_ratio": "coverage",
    "layer_surrogate_width": "surrogate width",
    "layer_firing_rate_ratio": "firing rate",
    "layer_participation_ratio": "participation",
    "layer_gradient_norm": "log₁₀ of the gradient's norm",
}

LAYERS = """<p>Rows are spiking layers, the first on top. χ is the proportion of a layer's weights with a non-zero
gradient; coverage is the fraction of its neuron-steps that lie within the surrogate's width of the threshold;
participation is the effective proportion of its weights that receive gradient.</p>"""


def training_records(run_dir: Path) -> list[dict]:
    return [record for record in read_journal(run_dir / "metrics.jsonl") if "train_loss" in record]


def last_training_record(run_dir: Path) -> dict:
    return training_records(run_dir)[-1]


def curves(run_dir: Path) -> Figure:
    """Loss and accuracy over steps, the evaluations as dots."""
    records = training_records(run_dir)
    evaluations = [record for record in read_journal(run_dir / "metrics.jsonl") if "eval_loss" in record]
    steps = [record["step"] for record in records]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    left.plot(steps, [record["train_loss"] for record in records], label="training")
    right.plot(steps, [100 * record["train_accuracy_ratio"] for record in records], label="training")
    at = [record["step"] for record in evaluations]
    left.plot(at, [record["eval_loss"] for record in evaluations], "o", label="validation")
    right.plot(at, [100 * record["eval_accuracy_ratio"] for record in evaluations], "o", label="validation")
    left.set(xlabel="step", ylabel="cross-entropy, nats", ylim=(0, None))
    right.set(xlabel="step", ylabel="top-1 accuracy, %")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def heatmaps(run_dir: Path, layers: Sequence[str]) -> Figure:
    """What χ and its companions did, by layer (rows, first on top) and step (columns)."""
    records = training_records(run_dir)
    steps = [record["step"] for record in records]
    labels = layer_labels(layers)
    rows = max(2.2, 0.24 * len(labels) + 0.9)
    figure, grid = plt.subplots(3, 2, figsize=(10, 3 * rows), layout="constrained", sharey=True, sharex=True)
    for axes, (name, title) in zip(grid.flat, HEATMAPS.items(), strict=True):
        values = np.array([record[name] for record in records], dtype=float).T
        if name == "layer_gradient_norm":
            values = np.log10(np.where(values > 0, values, np.nan))
        edges = np.concatenate(([steps[0] - 1], steps))
        mesh = axes.pcolormesh(edges, np.arange(len(labels) + 1), values, cmap="viridis")
        axes.set(title=title)
        axes.set_yticks(np.arange(len(labels)) + 0.5, labels, fontsize=7)
        figure.colorbar(mesh, ax=axes)
    grid[0, 0].invert_yaxis()
    for axes in grid[-1]:
        axes.set_xlabel("step")
    return figure


def write(run_dir: Path, summary: dict) -> Path:
    """Writes RUN/report.html from the run's files and its result."""
    run = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    journal = read_journal(run_dir / "metrics.jsonl")
    found = guards.findings(ChiConfig(**config["chi"]), layer_labels(run["layers"]), journal)
    accuracy = summary.get("eval_accuracy_ratio")
    result = {
        "recipe": config["recipe"],
        "steps": summary.get("step"),
        "validation accuracy": "not evaluated yet" if accuracy is None else f"{100 * accuracy:.2f} %",
        "parameters": f"{run['num_parameters']:,}",
        "ranks": run["world_size"],
        "seed": run["seed"],
        "commit": run["commit"],
        **run["versions"],
    }
    text = document(
        run_dir.name,
        table(result),
        "<h2>Learning</h2>",
        picture(curves(run_dir), "loss and accuracy over steps"),
        "<h2>Layers</h2>",
        LAYERS,
        picture(heatmaps(run_dir, run["layers"]), "χ and its companions by layer and step"),
        points(found or ["nothing to report: no layer starves, stands at a limit, or fails to answer its width"]),
        f"<h2>Configuration</h2><pre>{html.escape(json.dumps(config, indent=2, ensure_ascii=False))}</pre>",
    )
    path = run_dir / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def replay(run_dir: Path) -> int:
    """Makes every decision of the run again from the evidence in its journal; 0 where all widths are the same."""
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    steps = guards.replay(ChiConfig(**config["chi"]), read_journal(run_dir / "metrics.jsonl"))
    differing = [step for step, recorded, again in steps if recorded != again]
    for step, recorded, again in steps:
        widths = " ".join(f"{width:.4f}" for width in again)
        print(f"step {step}: {widths}" + ("" if recorded == again else "   differs from the run"))
    print(f"{len(steps)} decisions made again, {len(differing)} differ from the run's")
    return EXIT_INTERNAL if differing else EXIT_DONE


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.report", description="run folder → report.html")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, finished or not")
    parser.add_argument("--out", type=Path, metavar="FILE", help="page of several runs [comparison.html beside them]")
    parser.add_argument("--replay", action="store_true", help="make every decision on the widths again, and compare")
    options = parser.parse_args(arguments)
    run_dir = options.runs[0]
    for folder in options.runs:
        if not (folder / "run.json").exists() or not training_records(folder):
            print(f"{folder} holds no run with a logged step; name a run folder such as runs/digits", file=sys.stderr)
            return EXIT_USAGE
    if len(options.runs) > 1 and options.replay:
        print("--replay looks at one run; name one", file=sys.stderr)
        return EXIT_USAGE
    if len(options.runs) > 1:
        print(comparison.write(options.runs, options.out or run_dir.parent / "comparison.html"))
        return EXIT_DONE
    if options.replay:
        return replay(run_dir)
    summary = run_dir / "summary.json"
    print(write(run_dir, json.loads(summary.read_text()) if summary.exists() else {}))
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
