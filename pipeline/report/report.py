"""A run folder → report.html: one file, pictures inside, opens without a network.

`python -m pipeline.report RUN` makes it at any time, also while the run goes on; with more runs it makes one page that
shows them side by side (comparison.py).
"""

import argparse
import html
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pipeline.chi import decisions
from pipeline.config import ChiConfig
from pipeline.errors import EXIT_DONE, EXIT_INTERNAL, EXIT_USAGE, first_line, is_outage
from pipeline.metrics.journal import layer_labels, read_journal
from pipeline.report import comparison, page, spikes

LAYERS = f"""<p>Rows are spiking layers, the first on top. χ is the proportion of a layer's weights with a non-zero
gradient. It warns: its scale is always 0 to 1, and red is below {page.CHI_ALERT}, where the alert SnnChiLow fires.
Coverage is the fraction of a layer's neuron-steps that lie within the surrogate's width of the threshold: what policy
chi holds, by moving the width. Participation is the effective proportion of the weights that receive gradient.</p>"""


def training_records(run_dir: Path) -> list[dict]:
    return [record for record in read_journal(run_dir / "metrics.jsonl") if "train_loss" in record]


def last_training_record(run_dir: Path) -> dict:
    return training_records(run_dir)[-1]


def curves(run_dir: Path) -> dict[str, Figure]:
    """Loss, accuracy, learning rate and throughput over steps: a figure each, by its alternative text."""
    records = training_records(run_dir)
    evaluated = [record for record in read_journal(run_dir / "metrics.jsonl") if "eval_loss" in record]
    pictures = {}
    for name, ylabel, factor in (
        ("loss", "cross-entropy, nats", 1),
        ("accuracy_ratio", "top-1 accuracy, %", 100),
        ("learning_rate", "learning rate", 1),
        ("images_per_second", "images/s, all ranks", 1),
    ):
        figure, axes = page.panel()
        axes.plot(*_course(records, f"train_{name}", factor), label="training")
        if name in ("loss", "accuracy_ratio"):
            axes.plot(*_course(evaluated, f"eval_{name}", factor), "o-", markersize=5, label="validation")
            axes.legend(frameon=False)
        axes.set(xlabel="step", ylabel=ylabel)
        axes.set_ylim(bottom=0)
        pictures[f"{ylabel} over steps"] = figure
    return pictures


def _course(records: Sequence[dict], name: str, factor: float) -> tuple[list[int], np.ndarray]:
    """Steps and values; NaN where a record has no finite value."""
    return [record["step"] for record in records], factor * np.array(
        [record.get(name) for record in records], dtype=float
    )


def layer_maps(run_dir: Path, layers: Sequence[str]) -> dict[str, Figure]:
    """χ and its companions by layer and step: a figure each, by its alternative text."""
    records, labels = training_records(run_dir), layer_labels(layers)
    return {
        f"{title} by layer and step": page.layer_map(
            records, labels, name, page.scale_of(name, [page.layer_values(records, name)])
        )
        for name, title in page.LAYER_MAPS.items()
    }


def evaluations(run_dir: Path) -> list[str]:
    """The newest evaluation that `launch.evaluate` kept of every split: its figures and its worst confusions."""
    newest: dict[str, str] = {}
    for path in sorted((run_dir / "evaluations").glob("step-*.json")):  # by step: the number has leading zeros
        split = path.stem.split("-", 2)[-1]
        try:
            newest[split] = _evaluation(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            newest[split] = f"<p>{html.escape(f'{path} cannot be read ({error!r}); evaluate again')}</p>"
    hint = f"<p>Not made yet: <code>python -m launch.evaluate {html.escape(str(run_dir))}</code> adds it here.</p>"
    return list(newest.values()) or [hint]


def _evaluation(result: dict) -> str:
    """A paragraph of figures and a table of confusions, as HTML."""
    loss, accuracy = result["eval_loss"], 100 * result["eval_accuracy_ratio"]
    weights = ", averaged weights" if result["weights"] == "ema" else ""
    said = f"Split {result['split']} after step {result['step']}{weights}: {accuracy:.2f} % of "
    said += f"{result['num_samples']:,} samples right, loss " + ("not finite" if loss is None else f"{loss:.4f}") + "."
    rows = [
        (f"{pair['class']} → {pair['answered']}", (pair["num_samples"], f"{100 * pair['of_class_ratio']:.1f} %"))
        for pair in result.get("confused", ())
    ]
    text = f"<p>{html.escape(said)}"
    if "confused" not in result:
        return f"{text} Evaluate again to see which classes were confused.</p>"
    if not rows:
        return f"{text} No class was taken for another.</p>"
    top = ["samples", "of the class"]
    return f"{text} Most often confused (class → answer):</p>{page.columns(top, rows)}"


def write(run_dir: Path, summary: dict | None = None) -> Path:
    """Writes RUN/report.html from the run's files and its result: `summary`, else that in summary.json, if any."""
    stored = run_dir / "summary.json"
    if summary is None and stored.exists():
        summary = json.loads(stored.read_text(encoding="utf-8"))
    summary = summary or {}
    run = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    journal = read_journal(run_dir / "metrics.jsonl")
    found = decisions.findings(ChiConfig(**config["chi"]), layer_labels(run["layers"]), journal)
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
    text = page.document(
        run_dir.name,
        page.table(result),
        "<h2>Learning</h2>",
        page.gallery(curves(run_dir)),
        "<h2>Evaluation</h2>",
        *evaluations(run_dir),
        "<h2>Layers</h2>",
        LAYERS,
        page.gallery(layer_maps(run_dir, run["layers"])),
        page.points(found or ["nothing to report: no layer starves, stands at a limit, or fails to answer its width"]),
        *spikes.parts(run_dir, layer_labels(run["layers"]), journal),
        f"<h2>Configuration</h2><pre>{html.escape(json.dumps(config, indent=2, ensure_ascii=False))}</pre>",
    )
    return page.write(run_dir / "report.html", text)


def replay(run_dir: Path) -> int:
    """Makes every decision of the run again from the evidence in its journal; 0 where all widths are the same."""
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    steps = decisions.replay(ChiConfig(**config["chi"]), read_journal(run_dir / "metrics.jsonl"))
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
        if problem := _problem(folder):
            print(problem, file=sys.stderr)
            return EXIT_USAGE
    if len(options.runs) > 1 and options.replay:
        print("--replay looks at one run; name one", file=sys.stderr)
        return EXIT_USAGE
    if options.replay:
        return replay(run_dir)
    try:
        several = len(options.runs) > 1
        page_of = options.out or run_dir.parent / "comparison.html"
        print(comparison.write(options.runs, page_of) if several else write(run_dir))
    except OSError as error:
        print(f"{error.filename} cannot be written ({error.strerror}); choose another place", file=sys.stderr)
        return EXIT_INTERNAL if is_outage(error) else EXIT_USAGE
    return EXIT_DONE


def _problem(folder: Path) -> str:
    """Why this folder has no report, in one line; empty where it can have one."""
    if not (folder / "run.json").exists() or not training_records(folder):
        return f"{folder} holds no run with a logged step; name a run folder such as runs/digits"
    for name in ("run.json", "config.json"):
        try:
            json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"{folder / name} cannot be read ({first_line(error)}); name another run folder"
    return ""


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
