"""Panels of the Grafana dashboards without Grafana:  python k8s/monitoring/picture.py FILE.png [--run RUN]

Queries, titles, units and legends are those of the dashboards' files; the data come from a Prometheus. It needs
matplotlib beside the standard library. `--link` needs only the latter: it prints the address of Prometheus' own page,
with the most important graphs already in it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import FuncFormatter

DASHBOARDS = Path(__file__).parent / "grafana/dashboards"
PANELS = (
    ("overview", "Throughput, images per second"),
    ("overview", "Loss"),
    ("overview", "Accuracy"),
    ("layers", "χ: weights that receive gradient"),
    ("layers", "Coverage: near the threshold"),
    ("layers", "Width of the surrogate"),
    ("layers", "Participation of the weights"),
    ("layers", "Firing rate: neuron-steps that spike"),
    ("data", "Where the time goes"),
)
GRAPHS = (
    "snn_train_loss",
    "min by (run) (snn_layer_chi)",
    "snn_layer_surrogate_width",
    "snn_train_images_per_second",
)
"""What the link's graphs show, one expression each."""
SCRAPE_S = 5
"""scrape_interval of prometheus.yml: a smaller step shows no more points."""
MOST_POINTS = 300
TICKS_S = [s * 60**power for power in range(4) for s in (5, 10, 15, 30, 60)]
Series = list[tuple[str, dict[int, float]]]
"""A legend, and values by time."""


def panel(dashboard: str, title: str) -> dict:
    panels = json.loads((DASHBOARDS / f"{dashboard}.json").read_text(encoding="utf-8"))["panels"]
    return next(one for one in panels if one["title"] == title)


def link(url: str, minutes: float) -> str:
    """The address of Prometheus' page of graphs with `GRAPHS` in it, over the last `minutes`."""
    fields = {}
    for number, expression in enumerate(GRAPHS):
        graph = {"expr": expression, "tab": 0, "range_input": f"{max(1, round(minutes))}m"}
        fields |= {f"g{number}.{name}": value for name, value in graph.items()}
    # In a terminal a plus sign or a bracket would end the link.
    return f"{url}/graph?{urllib.parse.urlencode(fields, quote_via=urllib.parse.quote)}"


def filled(expression: str, run: str, step: int) -> str:
    """An expression with the dashboard's variables as Grafana would put them in."""
    rate_interval = f"{max(4 * SCRAPE_S, step + SCRAPE_S)}s"
    values = {"job": ".+", "run": run, "node": ".+", "__rate_interval": rate_interval}
    return re.sub(r"\$(\w+)", lambda name: values[name[1]], expression)


def ask(url: str, expression: str, start: int, end: int, step: int) -> list[dict]:
    query = urllib.parse.urlencode({"query": expression, "start": start, "end": end, "step": step})
    try:
        with urllib.request.urlopen(f"{url}/api/v1/query_range?{query}", timeout=30) as response:
            return json.load(response)["data"]["result"]
    except OSError as error:
        message = f"error: no Prometheus answers at {url} ({error}); start one (make monitor), or give --url"
        raise SystemExit(message) from None


def read(one: dict, url: str, run: str, start: int, end: int) -> Series:
    """All series of a panel, NaN where Prometheus has nothing."""
    step = max(SCRAPE_S, math.ceil((end - start) / MOST_POINTS))
    found = []
    for target in one["targets"]:
        for series in ask(url, filled(target["expr"], run, step), start, end, step):
            of = series["metric"]
            legend = re.sub(r"{{(\w+)}}", lambda label, of=of: of.get(label[1], ""), target["legendFormat"])
            values = {int(at): float(value) for at, value in series["values"]}
            found.append((legend, {at: values.get(at, math.nan) for at in range(start, end + 1, step)}))
    return found


def curves(axis: Axes, one: dict, series: Series) -> None:
    for legend, values in series:
        axis.plot(list(values), list(values.values()), label=legend, linewidth=1.6)
    axis.set_ylim(bottom=0)


def stack(axis: Axes, one: dict, series: Series) -> None:
    heights = [list(values.values()) for _, values in series]
    axis.stackplot(list(series[0][1]), heights, labels=[legend for legend, _ in series], alpha=0.75)
    axis.set_ylim(0, 1)


def history(axis: Axes, one: dict, series: Series) -> None:
    """A row for each layer, its first layer at the top, and a scale that says what the colours mean."""
    from matplotlib.ticker import MaxNLocator

    series = sorted(series, key=lambda one: one[0], reverse=True)
    rows = [list(values.values()) for _, values in series]
    mesh = axis.pcolormesh(
        list(series[0][1]), range(len(rows)), rows, shading="nearest", cmap="viridis", rasterized=True
    )
    names = [legend for legend, _ in series]
    first_column = axis.get_subplotspec().is_first_col()
    axis.set_yticks(range(len(names)), names if first_column else [""] * len(names))
    axis.grid(visible=False)
    beside = axis.inset_axes((1.02, 0, 0.04, 1))
    scale = axis.figure.colorbar(mesh, cax=beside, format=formatter(one), ticks=MaxNLocator(4))
    scale.ax.tick_params(labelsize=8)


def formatter(one: dict) -> FuncFormatter:
    from matplotlib.ticker import FuncFormatter

    percent = one["fieldConfig"]["defaults"]["unit"] == "percentunit"
    return FuncFormatter(lambda value, _: f"{100 * value:.3g} %" if percent else f"{value:,.4g}")


def draw(path: str, url: str, minutes: float, run: str) -> None:
    """Draws PANELS into a PNG file. SystemExit with one line where Prometheus does not answer or lacks the run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    end = int(time.time())
    panels = [panel(*where) for where in PANELS]
    found = [read(one, url, run, end - int(60 * minutes), end) for one in panels]
    times = [at for series in found for _, values in series for at, value in values.items() if not math.isnan(value)]
    if not times:
        raise SystemExit(f"error: {url} holds nothing of run {run!r} within {minutes:g} minutes")
    began, ended = min(times), max(times)
    figure, axes = pyplot.subplots(3, 3, figsize=(11, 8))
    figure.subplots_adjust(left=0.155, right=0.945, bottom=0.07, top=0.97, wspace=0.42, hspace=0.27)
    for axis, one, series in zip(axes.flat, panels, found, strict=True):
        axis.set_title(one["title"], loc="left", fontsize=10, fontweight="bold")
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
        stacked = "stacking" in one["fieldConfig"]["defaults"].get("custom", {})
        plot = history if one["type"] == "status-history" else stack if stacked else curves
        if not series:  # as of coverage, with a surrogate that has none
            axis.text(0.5, 0.5, "no data", transform=axis.transAxes, ha="center")
            continue
        plot(axis, one, series)
        if plot is not history:
            axis.yaxis.set_major_formatter(formatter(one))
            axis.legend(fontsize=7, framealpha=0.8, handlelength=1.2, loc="center" if stacked else "best")
        axis.set_xlim(began, ended)
        every = next(s for s in TICKS_S if s >= (ended - began) / 6)
        axis.set_xticks(range(began, ended + 1, every))
        axis.xaxis.set_major_formatter(
            FuncFormatter(lambda at, _: f"{(at - began) // 60:.0f}:{(at - began) % 60:02.0f}")
        )
    figure.supxlabel("minutes:seconds since the first scrape", fontsize=9, y=0.012)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", help="path of the PNG")
    parser.add_argument("--link", action="store_true", help="draw nothing, print the address of Prometheus' own graphs")
    parser.add_argument("--url", default="http://127.0.0.1:9095", help="address of Prometheus")
    parser.add_argument("--minutes", type=float, default=30, help="how far to look back")
    parser.add_argument("--run", default=".+", help="name of the run, a regular expression")
    options = parser.parse_args()
    if options.link:
        print(link(options.url, options.minutes))
        raise SystemExit(0)
    if options.path is None:
        parser.error("give the path of the PNG, or --link")
    draw(options.path, options.url, options.minutes, options.run)
