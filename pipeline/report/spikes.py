"""RUN/spikes.json and the journal → what the report shows of spikes, potentials, answers and gradients.

The drawings are SVG in the page itself: sharp at any width, in the colours of the reader's scheme, and small.
"""

import html
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from pipeline.errors import first_line

WIDTH = 400
"""Of every drawing, in its own units; a drawing is shown about so many pixels wide, so text of 11 can be read."""
LARGE, SMALL, MANY = 3, 2, 250
"""Height of a neuron's row in the raster, and that where there are more rows than MANY."""
MOST_POINTS = 4000
"""Of all curves of the gradient norm together."""
DEPTH = ((47, 107, 184), (138, 92, 172), (214, 97, 38))
"""Colours of the first, the middle and the last layer, seen on white and on black."""
_PICTURE = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]+=*")


def parts(run_dir: Path, labels: Sequence[str], journal: Sequence[dict]) -> list[str]:
    """The section as HTML.

    Args:
        run_dir: the run's folder; where it has no spikes.json, or a damaged one, a sentence says so.
        labels: of the layers, in forward order.
        journal: the run's records.
    """
    path = run_dir / "spikes.json"
    try:
        seen = json.loads(path.read_text(encoding="utf-8"))
        shown = _seen(seen, labels, _start_widths(journal, len(labels)))
    except FileNotFoundError:
        shown = [
            "<p>The raster, the potentials and the samples are not there: they are made when a run ends, and this run "
            f"has not ended, or an older version made it. <code>python -m launch.evaluate {html.escape(str(run_dir))}"
            "</code> adds them.</p>"
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        said = f"{path} cannot be read ({reason}), so its drawings are left out; evaluate again"
        shown = [f"<p>{html.escape(said)}</p>"]
    return ["<h2>Gradients</h2>", *gradients(journal, labels), "<h2>Spikes</h2>", *shown]


def _seen(seen: dict, labels: Sequence[str], start: list[float | None]) -> list[str]:
    weights = ", averaged weights" if seen["weights"] == "ema" else ""
    drawn = ""
    if seen["sample"]:
        drawing, caption = raster(seen, labels)
        drawn = f"<figure><figcaption>{caption}</figcaption>{drawing}</figure>"
    histograms = [potentials(one, labels, start, seen["num_images"]) for one in seen["potentials"]]
    return [
        f"<p>The network after step {int(seen['step'])}{weights}, on samples of the split "
        f"{html.escape(seen['split'])}.</p>",
        f'<div class="gallery">{drawn}<div class="stack">{"".join(figure(*each) for each in histograms)}</div></div>',
        "<h2>Samples</h2>",
        *samples(seen),
    ]


def figure(drawing: str, caption: str) -> str:
    """A drawing and the HTML below it."""
    return f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>"


def svg(height: float, name: str, title: str, body: str) -> str:
    """A drawing `WIDTH` wide, which a screen reader announces by its title; `name` is its own on the page."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-labelledby="{name}"><title id="{name}">'
        f"{html.escape(title)}</title>{body}</svg>"
    )


def text(x: float, y: float, said: str, *, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{html.escape(said)}</text>'


def raster(seen: dict, labels: Sequence[str]) -> tuple[str, str]:
    """Spikes of one sample: a band for each layer, in it a row for each neuron and a column for each time step."""
    T = max((len(row) for layer in seen["layers"] for row in layer["rows"]), default=1)
    column, y, bands = WIDTH / T, 16.0, []
    tall = LARGE if sum(len(layer["rows"]) for layer in seen["layers"]) <= MANY else SMALL
    steps = {round(t) for t in np.linspace(0, T - 1, min(T, 8))}
    ticks = "".join(text((t + 0.5) * column, 10, f"{t + 1}", kind="faint", anchor="middle") for t in sorted(steps))
    for label, layer in zip(labels, seen["layers"], strict=True):
        neurons, spikes, rows = layer["num_neurons"], layer["spikes"], layer["rows"]
        height = tall * max(1, len(rows))
        if rows:
            said = f"{100 * sum(spikes) / (neurons * len(spikes)):.1f} % of {neurons:,} neurons"
            marks = "".join(
                f"M{t * column + 0.08 * column:.4g} {y + 14 + tall * (row + 0.5):g}h{0.84 * column:.4g}"
                for row, digits in enumerate(rows)
                for t, digit in enumerate(digits)
                if digit == "1"
            )
            more = f"{label}: spikes of all {neurons:,} neurons at each step: {', '.join(map(str, spikes))}"
        else:
            said, marks, more = "not shown", "", f"{label} does not run once for each time step of the sample"
        bands.append(
            f"<g><title>{html.escape(more)}</title>{text(0, y + 10, label)}"
            f"{text(WIDTH, y + 10, said, kind='faint', anchor='end')}"
            f'<rect x="0" y="{y + 14:g}" width="{WIDTH}" height="{height}" class="box"/>'
            f'<path d="{marks}" class="spike" stroke-width="{0.75 * tall:g}"/></g>'
        )
        y += height + 20
    sample = seen["sample"]
    title = f"Spikes by layer and time step of validation sample {sample['number']}, class {sample['class']}"
    left_out = f" The first {T} of its {seen['num_steps']} time steps are drawn." if seen["num_steps"] > T else ""
    caption = (
        f"<b>Spikes of sample {int(sample['number'])}</b>: {_said(sample)}. From left to right its time steps, "
        " from top to bottom its layers; a row is a neuron, a dash a spike. Of a large layer some neurons are "
        f"drawn, spread evenly over channels and places; the share is that of all its neurons and steps.{left_out}"
    )
    return svg(y, "raster", title, ticks + "".join(bands)), f"{_image(sample)}{caption}"


def potentials(one: dict, labels: Sequence[str], start: list[float | None], num_images: int) -> tuple[str, str]:
    """The distribution of h - v_th in a layer, with the surrogate over it."""
    low, high, width = one["low"], one["high"], one["width"]
    label, began = labels[int(one["layer"])], start[int(one["layer"])]
    top, bottom = 26.0, 180.0

    def x(u: float) -> float:
        return round((u - low) / (high - low) * WIDTH, 1)

    def line(u: float, kind: str) -> str:
        return f'<path d="M{x(u)} {top:g}V{bottom:g}" class="{kind}"/>'

    body = _bars(one["counts"], top, bottom)
    if one["bounded"]:
        wide, tall = x(width) - x(-width), bottom - top
        body += f'<rect x="{x(-width)}" y="{top:g}" width="{wide:.4g}" height="{tall:g}" class="support"/>'
    if began is not None and began < min(-low, high) and abs(math.log(began / width)) > 0.01:
        body += line(-began, "start") + line(began, "start")
    body += line(0, "axis") + text(x(0), 10, "threshold", kind="faint", anchor="middle")
    peak = max(g for _, g in one["curve"]) or 1
    curve = " ".join(f"{x(u)},{bottom - (bottom - top) * g / peak:.4g}" for u, g in one["curve"])
    body += f'<polyline points="{curve}" class="surrogate"/><path d="M0 {bottom:g}H{WIDTH}" class="axis"/>'
    for tick in MaxNLocator(6).tick_values(low, high):
        if low <= tick <= high:
            at = min(max(x(tick), 10), WIDTH - 10)
            body += text(at, bottom + 14, _minus(tick), kind="faint", anchor="middle")
    body += text(WIDTH / 2, bottom + 29, "h − v_th, units of the potential", kind="faint", anchor="middle")
    within = f": {100 * one['coverage_ratio']:.1f} % of the neuron-steps lie in it" if one["bounded"] else ""
    was = f" (at the start {began:.3g})" if began is not None else ""
    caption = (
        f"<b>{html.escape(label)}</b>, {int(num_images)} images. Surrogate {html.escape(one['surrogate'])} of width "
        f"{width:.3g}{was}{within}, {100 * one['firing_rate_ratio']:.1f} % fire."
    )
    title = f"Membrane potentials of {label} and its surrogate of width {width:.3g}"
    return svg(bottom + 34, f"potentials-{int(one['layer'])}", title, body), caption


def _bars(counts: Sequence[int], top: float, bottom: float) -> str:
    """The bars of a histogram, as wide as the drawing.

    One value may be very frequent, such as that of neurons without input. It must not flatten all others: a bar above
    three times the fourth highest is cut off, and has an arrow.
    """
    highest = max(1, min(max(counts), 3 * sorted(counts)[-4]))
    step, bars, arrows = WIDTH / len(counts), "", ""
    for bin, count in enumerate(counts):
        if count:
            bars += (
                f"M{bin * step:.4g} {bottom:g}v{-(bottom - top) * min(1, count / highest):.4g}h{step:.3g}V{bottom:g}"
            )
        if count > highest:
            arrows += text((bin + 0.5) * step, top - 3, "↑", anchor="middle")
    return f'<path d="{bars}" class="bars"/>{arrows}'


def _minus(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def samples(seen: dict) -> list[str]:
    """Pictures of samples that were answered wrong, then right, each with what the network said."""
    groups = []
    for name, kind in (("Answered wrong", "wrong"), ("Answered right", "right")):
        cards = "".join(
            f"<figure>{_image(sample)}<figcaption>{_said(sample)}</figcaption></figure>" for sample in seen[kind]
        )
        groups.append(f"<h3>{name}</h3>" + (f'<div class="samples {kind}">{cards}</div>' if cards else "<p>None.</p>"))
    return [
        "<p>The first ones of the last evaluation, of as many classes as there are. The percentage is the softmax of "
        "the logits, averaged over time.</p>",
        *groups,
    ]


def _said(sample: dict) -> str:
    """The class, and the answer with its confidence, as HTML."""
    of, answer = html.escape(str(sample["class"])), html.escape(str(sample["answer"]))
    if sample["class"] == sample["answer"]:
        return f"✓ <b>{of}</b> with {_percent(sample['confidence_ratio'])}"
    return (
        f"✗ <b>{of}</b>, answered <b>{answer}</b> with {_percent(sample['confidence_ratio'])}; {of} with "
        f"{_percent(sample['confidence_of_class_ratio'])}"
    )


def _percent(ratio: float | None) -> str:
    if ratio is None:
        return "no finite confidence"
    return "less than 1 %" if 0 < ratio < 0.005 else f"{100 * ratio:.0f} %"


def _image(sample: dict) -> str:
    if not _PICTURE.fullmatch(sample["picture"]):
        raise ValueError("a picture is no data: URL of a PNG or JPEG")
    said = f"sample {sample['number']}, class {sample['class']}"
    return f'<img class="sample" alt="{html.escape(said)}" src="{sample["picture"]}">'


def _start_widths(journal: Sequence[dict], count: int) -> list[float | None]:
    """The widths that the run began with; None where the journal does not say."""
    logs = next((record["decision_log_width"] for record in journal if "decision_log_width" in record), [])
    return [math.exp(value) for value in logs] if len(logs) == count else [None] * count


def gradients(journal: Sequence[dict], labels: Sequence[str]) -> list[str]:
    """The norm of every layer's gradient over the steps: a curve for each layer."""
    records = [record for record in journal if "layer_gradient_norm" in record]
    values = np.array([record["layer_gradient_norm"] for record in records], dtype=float).T  # (L, records)
    steps = np.array([record["step"] for record in records], dtype=float)
    logs = np.log10(np.where(values > 0, values, np.nan)) if records else np.empty((0, 0))
    if not np.isfinite(logs).any():
        return ["<p>The journal holds no gradient norms.</p>"]
    groups = np.array_split(np.arange(len(steps)), min(len(steps), max(20, MOST_POINTS // len(labels))))
    low, high = math.floor(np.nanmin(logs)), math.ceil(np.nanmax(logs))
    high = max(high, low + 1)
    top, bottom, left = 10.0, 210.0, 30.0

    def x(step: float) -> float:
        return round(left + (WIDTH - left - 4) * (step - steps[0]) / max(1, steps[-1] - steps[0]), 1)

    def y(log: float) -> float:
        return round(bottom - (bottom - top) * (log - low) / (high - low), 1)

    body = ""
    for decade in range(low, high + 1, max(1, (high - low) // 6)):
        body += f'<path d="M{left:g} {y(decade)}H{WIDTH}" class="grid"/>'
        power = f'10<tspan dy="-4" font-size="8">{_minus(decade)}</tspan>'
        body += f'<text x="{left - 4:g}" y="{y(decade) + 4:g}" class="faint" text-anchor="end">{power}</text>'
    for tick in MaxNLocator(5, integer=True).tick_values(steps[0], steps[-1]):
        if steps[0] <= tick <= steps[-1]:
            body += text(min(x(tick), WIDTH - 12), bottom + 14, f"{tick:g}", kind="faint", anchor="middle")
    body += text((left + WIDTH) / 2, bottom + 28, "step", kind="faint", anchor="middle")
    key = ""
    for layer, label in enumerate(labels):
        line, drawing = "", False
        for group in groups:
            known = logs[layer, group][np.isfinite(logs[layer, group])]
            if len(known):
                line += f"{'L' if drawing else 'M'}{x(steps[group].mean())} {y(known.mean())}"
            drawing = len(known) > 0
        colour = depth_colour(layer, len(labels))
        body += f'<path d="{line}" class="curve" style="stroke: {colour}"><title>{html.escape(label)}</title></path>'
        if len(labels) <= 10 or layer in (0, len(labels) // 2, len(labels) - 1):
            key += f'<li><span style="color: {colour}">■</span> {html.escape(label)}'
    averaged = " Each point is the geometric mean of the logged steps around it." if len(groups) < len(steps) else ""
    caption = (
        f"<b>Norm of the gradient by layer</b>, as the optimizer gets it, on a logarithmic scale.{averaged} From the "
        f'first layer in blue to the last in orange:<ul class="key">{key}</ul>'
    )
    drawing = svg(bottom + 34, "gradients", "Norm of the gradient of every layer over the steps", body)
    return [f'<div class="gallery">{figure(drawing, caption)}</div>']


def depth_colour(layer: int, count: int) -> str:
    """The colour of a layer's curve, between those of DEPTH."""
    place = 2 * layer / max(1, count - 1)
    first, second = DEPTH[int(place)], DEPTH[min(2, int(place) + 1)]
    mixed = [round(a + (b - a) * (place - int(place))) for a, b in zip(first, second, strict=True)]
    return f"#{mixed[0]:02x}{mixed[1]:02x}{mixed[2]:02x}"
