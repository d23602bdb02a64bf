"""Parts of a page: one HTML file with its pictures inside, which opens without a network; readable on a phone too."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure

from pipeline.run_dir import atomic

STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --faint: #666; --line: #bbb; --box: #f3f3f3;
  --spike: #1f5fa8; --bars: #7d9cc0; --hot: #c2500f; --right: #1b7f3b; --wrong: #c2281d }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --paper: #16181c; --faint: #9a9a9a; --line: #555;
  --box: #23262c; --spike: #7db4f0; --bars: #4d6c90; --hot: #f08a3c; --right: #5fc27e; --wrong: #f2766b } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
body { color: var(--ink); background: var(--paper) }
img { width: 100%; height: auto; display: block } h1, p, li, td { overflow-wrap: anywhere }
th, td { padding-right: 1.2rem; text-align: left; vertical-align: top } th { font-weight: 600 }
table { border-collapse: collapse } thead th { border-bottom: 1px solid var(--line) }
pre { background: var(--box); padding: 1rem; overflow-x: auto }
.wide { overflow-x: auto } .wide td, .wide thead th { white-space: nowrap }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); gap: 1rem 2rem }
.gallery { margin-bottom: 1rem }
figure { margin: 0 } figcaption { font-size: 13px; overflow-wrap: anywhere }
.stack { display: grid; gap: 1rem; align-content: start }
svg { width: 100%; height: auto; display: block; font-size: 11px; fill: var(--ink) } svg .faint { fill: var(--faint) }
svg path, svg polyline { fill: none; stroke: var(--ink) } svg .box { fill: var(--box) }
svg .grid { stroke: var(--line); opacity: 0.5 }
svg .spike { stroke: var(--spike) } svg .bars { fill: var(--bars); stroke: none } svg .curve { stroke-width: 1.4 }
svg .support { fill: var(--hot); opacity: 0.15 } svg .surrogate { stroke: var(--hot); stroke-width: 2 }
svg .start { stroke: var(--hot); stroke-dasharray: 3 3 } svg .axis { stroke: var(--faint) }
.key { list-style: none; margin: 0; padding: 0; columns: 12rem 2 }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); gap: 1rem }
.sample { width: 6rem; image-rendering: pixelated } .gallery .sample { float: left; margin: 0 0.7rem 0.3rem 0 }
.gallery svg { clear: both }
.samples img { border-bottom: 3px solid }
.right img { border-color: var(--right) } .wrong img { border-color: var(--wrong) }
"""
PANEL_INCH, RESOLUTION = 4.4, 180
"""Width of a gallery's picture, and its pixels per inch: at the width of a phone its letters stay readable."""
CHI_ALERT = 0.2
"""χ of a layer below which SnnChiLow of k8s/monitoring/rules.yml fires."""
LAYER_MAPS = {
    "layer_chi": "χ",
    "layer_coverage_ratio": "coverage",
    "layer_surrogate_width": "surrogate width",
    "layer_firing_rate_ratio": "firing rate",
    "layer_participation_ratio": "participation",
    "layer_gradient_norm": "log₁₀ of the gradient's norm",
}
"""Names of a record's values by layer, and what a page calls them."""
NAME_LENGTH = 26
"""Most letters of a layer's name beside a map."""


def document(title: str, *parts: str) -> str:
    """The page of these parts, which are HTML; the title is text."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>"
    )
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *parts])
    return f'<!doctype html><html lang="en">{head}\n{body}\n</html>\n'


def write(path: Path, text: str) -> Path:
    """Writes a page at once: a reader finds the old one or the new one."""
    atomic.write(path, text)
    return path


def picture(figure: Figure, text: str) -> str:
    """The figure as an HTML image with `text` as its alternative text; closes the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=RESOLUTION)
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'


def gallery(figures: Mapping[str, Figure]) -> str:
    """The figures by their alternative text, side by side if the page is wide enough."""
    return f'<div class="gallery">{"".join(picture(figure, text) for text, figure in figures.items())}</div>'


def panel(height: float = 2.9) -> tuple[Figure, Axes]:
    """One picture of a gallery, `height` inches high."""
    figure, axes = plt.subplots(figsize=(PANEL_INCH, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def table(pairs: dict) -> str:
    rows = "".join(f"<tr><th>{html.escape(str(k))}<td>{html.escape(str(v))}" for k, v in pairs.items())
    return f"<table>{rows}</table>"


def columns(head: Sequence[str], rows: Mapping[str, Sequence] | Sequence[tuple[str, Sequence]]) -> str:
    """A table: a row for each name (a sequence may repeat one), a column for each of `head`, which is HTML."""
    top = "".join(f"<th>{cell}" for cell in ["", *head])
    lines = "".join(
        f"<tr><th>{html.escape(name)}" + "".join(f"<td>{html.escape(str(cell))}" for cell in cells)
        for name, cells in (rows.items() if isinstance(rows, Mapping) else rows)
    )
    return f'<div class="wide"><table><thead><tr>{top}</thead><tbody>{lines}</tbody></table></div>'


def points(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}" for line in lines) + "</ul>"


def layer_values(records: Sequence[dict], name: str) -> np.ndarray:
    """`(L, records)`: what the records say of every layer; NaN where it is not defined."""
    values = np.array([record[name] for record in records], dtype=float).T
    if name == "layer_gradient_norm":
        return np.log10(np.where(values > 0, values, np.nan))
    return values


def scale_of(name: str, values: Sequence[np.ndarray]) -> tuple[float, float]:
    """Lowest and highest value of a map's colours: for χ always 0 and 1, else those of all `values`."""
    finite = np.concatenate([of[np.isfinite(of)] for of in values])
    if name == "layer_chi":
        return 0.0, 1.0
    if finite.size == 0:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    # A value that never changes gets one colour, in the middle of its scale.
    return (
        (low, high) if high - low > 1e-6 * abs(high) else (low - 0.1 * (abs(low) or 1), high + 0.1 * (abs(high) or 1))
    )


def layer_map(
    records: Sequence[dict], labels: Sequence[str], name: str, scale: tuple[float, float], of: str = ""
) -> Figure:
    """One indicator by layer (rows, the first on top) and step (columns).

    Args:
        records: of logged steps, in order; `name` is one of `LAYER_MAPS`.
        labels: of the layers, `(L,)`.
        scale: see `scale_of`.
        of: what the title says after the indicator.
    """
    values = layer_values(records, name)
    steps = [record["step"] for record in records]
    figure, axes = plt.subplots(figsize=(PANEL_INCH, max(1.9, 0.22 * len(labels) + 0.8)), layout="constrained")
    edges = np.concatenate(([min(steps[0] - 1, 0)], steps))
    axes.set_facecolor("#ddd")  # seen where a value is not defined
    mesh = axes.pcolormesh(
        edges, np.arange(len(labels) + 1), np.ma.masked_invalid(values), cmap=_colours(name), norm=Normalize(*scale)
    )
    axes.set_yticks(np.arange(len(labels)) + 0.5, [_shortened(label) for label in labels], fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("step")
    axes.locator_params(axis="x", nbins=4)
    axes.set_title(
        " · ".join(filter(None, (LAYER_MAPS[name], _shortened(of)))), loc="left", fontsize=11, parse_math=False
    )
    if np.isnan(values).all():
        axes.text(0.5, 0.5, "not defined for this surrogate", transform=axes.transAxes, ha="center", va="center")
        return figure
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, anchor=(0.0, 1.0))
    bar.ax.tick_params(labelsize=8)
    if name == "layer_chi":
        bar.ax.axhline(CHI_ALERT, color="black", linewidth=1.5)
        ticks = [0.0, CHI_ALERT, 0.5, 1.0]
        bar.set_ticks(ticks, labels=[f"{tick:g} alert" if tick == CHI_ALERT else f"{tick:g}" for tick in ticks])
    return figure


def _colours(name: str) -> Colormap:
    """Viridis; for χ, values below its alert are red."""
    viridis = plt.get_cmap("viridis")
    if name != "layer_chi":
        return viridis
    colours = viridis(np.linspace(0, 1, 256))
    low = round(CHI_ALERT * 256)
    colours[:low] = plt.get_cmap("Reds_r")(np.linspace(0.05, 0.5, low))
    return ListedColormap(colours)


def _shortened(label: str) -> str:
    """A long name without its middle: the layer's number and its kind of neuron stay."""
    half = NAME_LENGTH // 2
    return label if len(label) <= NAME_LENGTH else f"{label[:half]}…{label[-(half - 1) :]}"
