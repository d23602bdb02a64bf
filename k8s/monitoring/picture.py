"""Draws a run as Prometheus holds it:  python k8s/monitoring/picture.py FILE.png [--url URL] [--minutes 30] [--run RUN]

For those without Grafana. Nothing but matplotlib beside the standard library.
"""

import argparse
import json
import time
import urllib.parse
import urllib.request

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

CURVES = {
    "Loss": {"training": "snn_train_loss", "validation": "snn_eval_loss"},
    "Accuracy": {"training": "snn_train_accuracy_ratio", "validation": "snn_eval_accuracy_ratio"},
    "Images per second": {"": "snn_train_images_per_second"},
    "χ by layer": {"{layer}": "snn_layer_chi"},
    "Coverage by layer": {"{layer}": "snn_layer_coverage_ratio"},
    "Width of the surrogate by layer": {"{layer}": "snn_layer_surrogate_width"},
    "Firing rate by layer": {"{layer}": "snn_layer_firing_rate_ratio"},
    "Seconds of a step, by rank": {"rank {rank}": "snn_train_step_duration_seconds"},
    "Waiting for data, share of the time, by rank": {
        "rank {rank}": 'sum by (rank) (rate(snn_train_phase_seconds_total{phase="data_wait",SELECT}[1m]))'
        " / sum by (rank) (rate(snn_train_phase_seconds_total{SELECT}[1m]))"
    },
}


def ask(url: str, expression: str, start: float, end: float) -> list[dict]:
    """The series of an expression between two times, at most 600 points each."""
    step = max(1.0, (end - start) / 600)
    query = urllib.parse.urlencode({"query": expression, "start": start, "end": end, "step": step})
    with urllib.request.urlopen(f"{url}/api/v1/query_range?{query}", timeout=30) as response:
        return json.load(response)["data"]["result"]


def draw(path: str, url: str, minutes: float, run: str) -> None:
    end = time.time()
    select = f'run=~"{run}"'
    figure, axes = pyplot.subplots(3, 3, figsize=(15, 9), constrained_layout=True)
    began = end
    for axis, (title, queries) in zip(axes.flat, CURVES.items(), strict=True):
        for legend, expression in queries.items():
            filled = expression.replace("SELECT", select) if "SELECT" in expression else f"{expression}{{{select}}}"
            found = ask(url, filled, end - 60 * minutes, end)
            for number, series in enumerate(found):
                times, values = zip(*((float(at), float(value)) for at, value in series["values"]), strict=True)
                began = min(began, times[0])
                color = pyplot.get_cmap("viridis")(number / max(1, len(found) - 1)) if "{layer}" in legend else None
                label = legend.format(**series["metric"])
                axis.plot(times, values, label=label, color=color, linewidth=1.5, marker="." if len(times) == 1 else "")
        axis.set_title(title, loc="left", fontsize=11)
        axis.grid(alpha=0.3)
        if any(queries) and axis.has_data():
            axis.legend(fontsize=7, frameon=False)
    for axis in axes.flat:
        axis.xaxis.set_major_formatter(lambda at, _: f"{at - began:.0f} s")
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="of the PNG")
    parser.add_argument("--url", default="http://127.0.0.1:9095", help="of Prometheus")
    parser.add_argument("--minutes", type=float, default=30, help="how far to look back")
    parser.add_argument("--run", default=".+", help="name of the run, a regular expression")
    options = parser.parse_args()
    draw(options.path, options.url, options.minutes, options.run)
