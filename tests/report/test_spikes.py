"""report/spikes.py: the section draws what spikes.json and the journal say, and says so where they say nothing."""

import html.parser
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.engine.insight.samples import KEPT
from pipeline.engine.insight.spikes import CELLS, FEWEST, MOST, ROWS, STEPS
from pipeline.metrics.journal import layer_labels, read_journal
from pipeline.report import page, report, spikes

DARK = "@media (prefers-color-scheme: dark)"


@pytest.fixture
def run(straight, tmp_path) -> Path:
    return Path(shutil.copytree(straight.run_dir, tmp_path / "run"))


def seen_of(run: Path) -> dict:
    return json.loads((run / "spikes.json").read_text())


def section(run: Path, seen: dict | None = None) -> str:
    """The HTML of the section; `seen` takes the place of spikes.json."""
    if seen is not None:
        (run / "spikes.json").write_text(json.dumps(seen))
    labels = layer_labels(json.loads((run / "run.json").read_text())["layers"])
    return "\n".join(spikes.parts(run, labels, read_journal(run / "metrics.jsonl")))


class Elements(html.parser.HTMLParser):
    """The open elements of a page, and a failure where one is closed that is not open."""

    VOID = ("img", "meta")
    LOOSE = ("li", "td", "th", "tr", "p")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.all: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.all.append((tag, dict(attrs)))
        if tag not in (*self.VOID, *self.LOOSE):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.all.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.LOOSE:
            assert self.open.pop() == tag


def test_every_spike_of_the_raster_is_a_dash(run):
    seen, text = seen_of(run), section(run)
    dashes = re.findall(r'<path d="([^"]*)" class="spike"', text)
    assert len(dashes) == len(seen["layers"]) == 6
    for path, layer in zip(dashes, seen["layers"], strict=True):
        assert path.count("h") == sum(row.count("1") for row in layer["rows"])
        places = [tuple(map(float, place)) for place in re.findall(r"M([\d.]+) ([\d.]+)h", path)]
        drawn = {(int(x // (spikes.WIDTH / 4)), y) for x, y in places}
        assert len(drawn) == len(places)
        by_step = [sum(row[t] == "1" for row in layer["rows"]) for t in range(4)]
        assert [sum(t == step for t, _ in drawn) for step in range(4)] == by_step
        rate = 100 * sum(layer["spikes"]) / layer["num_neurons"] / 4
        assert f"{rate:.1f} % of {layer['num_neurons']:,} neurons" in text


def test_the_histograms_have_their_bars_support_and_starting_width(run):
    seen, text = seen_of(run), section(run)
    began = np.exp(
        next(r["decision_log_width"] for r in read_journal(run / "metrics.jsonl") if "decision_log_width" in r)
    )
    drawings = re.findall(r'<svg [^>]*aria-labelledby="potentials-\d+".*?</figure>', text, re.DOTALL)
    assert [one["layer"] for one in seen["potentials"]] == [0, 3, 5]
    for one, drawing in zip(seen["potentials"], drawings, strict=True):
        bars = re.search(r'<path d="([^"]*)" class="bars"', drawing)
        assert bars
        assert bars[1].count("M") == sum(count > 0 for count in one["counts"])
        scale = spikes.WIDTH / (one["high"] - one["low"])
        support = re.search(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"[^>]*class="support"', drawing)
        assert support
        assert float(support[1]) == pytest.approx((-one["width"] - one["low"]) * scale, abs=0.1)
        assert float(support[2]) == pytest.approx(2 * one["width"] * scale, abs=0.2)
        points = re.search(r'<polyline points="([^"]*)" class="surrogate"', drawing)
        assert points
        heights = [float(point.split(",")[1]) for point in points[1].split()]
        peak = points[1].split()[int(np.argmin(heights))]
        assert float(peak.split(",")[0]) == pytest.approx(-one["low"] * scale, abs=0.1), "the triangle's peak, at v_th"
        assert f"at the start {began[one['layer']]:.3g}" in drawing
        assert f"{100 * one['coverage_ratio']:.1f} % of the neuron-steps lie in it" in drawing


def test_a_bar_that_would_flatten_all_others_is_cut_off_and_marked():
    bars = spikes._bars([5, 1000, 6, 7, 8, 9, 0], 0, 90)
    assert bars.count("↑") == 1
    heights = [-float(height) for height in re.findall(r"v(-[\d.]+)h", bars)]
    assert max(heights) == heights[1] == 90
    assert heights[5] == pytest.approx(90 * 9 / 21, abs=0.01), "three times the fourth highest, 7, fill the drawing"
    assert "↑" not in spikes._bars([5, 6, 7, 8], 0, 90)


def test_an_unbounded_surrogate_has_a_curve_and_no_support(run):
    seen = seen_of(run)
    seen["potentials"] = [{**one, "bounded": False, "surrogate": "atan"} for one in seen["potentials"]]
    text = section(run, seen)
    assert 'class="support"' not in text
    assert text.count('class="surrogate"') == 3
    assert "lie in it" not in text


def test_samples_have_their_picture_class_answer_and_confidence(run):
    seen = seen_of(run)
    seen["wrong"][0] |= {
        "class": "cat <b>",
        "answer": "dog",
        "confidence_ratio": 0.64,
        "confidence_of_class_ratio": None,
    }
    text = section(run, seen)
    assert "✗ <b>cat &lt;b&gt;</b>, answered <b>dog</b> with 64 %; cat &lt;b&gt; with no finite confidence" in text
    assert "cat <b>" not in text
    for sample in [*seen["wrong"], *seen["right"]]:
        assert f'src="{sample["picture"]}"' in text
    drawn = [*seen["right"], *seen["wrong"], seen["sample"]]  # the raster's sample too
    right = [sample for sample in drawn if sample["class"] == sample["answer"]]
    assert (text.count("✓"), text.count("✗")) == (len(right), len(drawn) - len(right))
    assert "<p>None.</p>" in section(run, {**seen, "wrong": []})


def test_gradients_have_a_curve_for_each_layer(run):
    journal = read_journal(run / "metrics.jsonl")
    records = [record for record in journal if "layer_gradient_norm" in record]
    records[4]["layer_gradient_norm"] = [None] * 6  # a step that was skipped
    labels = [f"{layer:02d}-layer" for layer in range(6)]
    (text,) = spikes.gradients(journal, labels)
    curves = re.findall(r'<path d="([^"]*)" class="curve" style="stroke: (#\w{6})"', text)
    assert len(curves) == 6
    assert len({colour for _, colour in curves}) == 6
    for path, _ in curves:
        assert path.count("M") == 2, "a gap at the step that was skipped"
        assert path.count("M") + path.count("L") == len(records) - 1
    last = np.array([float(path.rpartition("L")[2].split()[1]) for path, _ in curves])
    norms = np.array(records[-1]["layer_gradient_norm"])
    assert np.array_equal(np.argsort(last), np.argsort(-norms)), "a larger norm is drawn higher"
    assert np.corrcoef(last, np.log10(norms))[0, 1] == pytest.approx(-1, abs=1e-3), "on a logarithmic scale"
    assert spikes.gradients([], labels) == ["<p>The journal holds no gradient norms.</p>"]
    long = [{"step": step, "layer_gradient_norm": [0.5] * 6} for step in range(5000)]
    (text,) = spikes.gradients(long, labels)
    assert text.count("L") < spikes.MOST_POINTS
    assert "geometric mean" in text


def test_a_run_without_the_file_has_its_report_and_a_sentence(run, capsys):
    (run / "spikes.json").unlink()
    assert report.main([str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "are made when a run ends, and this run has not ended, or an older version made it" in text
    assert f"<code>python -m launch.evaluate {run}</code> adds them" in text
    assert 'class="spike"' not in text.partition("</style>")[2]
    assert text.count('class="curve"') == 6, "the gradients come from the journal"


def damage(seen: dict) -> list[object]:
    without = {name: value for name, value in seen.items() if name != "layers"}
    sample = {**seen["right"][0], "picture": "https://example.org/spy.png"}
    return [
        "{",
        [],
        {},
        without,
        {**seen, "layers": seen["layers"][:2]},
        {**seen, "potentials": [{**seen["potentials"][0], "layer": 99}]},
        {**seen, "potentials": [{**seen["potentials"][0], "low": 1, "high": 1}]},
        {**seen, "potentials": [{**seen["potentials"][0], "counts": []}]},
        {**seen, "right": [sample]},
        {**seen, "step": "<script>"},
    ]


def test_a_damaged_file_is_named_and_the_rest_of_the_page_is_there(run):
    for content in damage(seen_of(run)):
        (run / "spikes.json").write_text(content if isinstance(content, str) else json.dumps(content))
        assert report.main([str(run)]) == 0
        text = (run / "report.html").read_text()
        assert f"{run}/spikes.json cannot be read (" in text, content
        assert "example.org" not in text
        assert "<script>" not in text
        assert "<h2>Configuration</h2>" in text


def test_the_page_is_well_formed_and_every_drawing_has_a_title(run):
    assert report.main([str(run)]) == 0
    elements = Elements((run / "report.html").read_text(encoding="utf-8"))
    names = [attributes["id"] for _, attributes in elements.all if "id" in attributes]
    assert len(names) == len(set(names))
    drawings = [attributes for tag, attributes in elements.all if tag == "svg"]
    assert len(drawings) == 5
    assert all(drawing["role"] == "img" and drawing["aria-labelledby"] in names for drawing in drawings)
    assert all(attributes.get("alt") for tag, attributes in elements.all if tag == "img")
    sources = [value for _, attributes in elements.all for name, value in attributes.items() if name in ("src", "href")]
    assert all(source.startswith("data:image/") for source in sources)


def test_both_schemes_define_the_same_colours_and_drawings_use_no_others(run):
    light, dark = (set(re.findall(r"(--\w+):", part)) for part in page.STYLE.split(DARK))
    assert dark == light
    assert set(re.findall(r"var\((--\w+)\)", page.STYLE)) == light
    text = section(run)
    outside = set(re.findall(r"#[0-9a-f]{6}\b", re.sub(r"data:[^\"]*", "", text)))
    assert outside == {spikes.depth_colour(layer, 6) for layer in range(6)}


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """WCAG's contrast ratio of two colours."""

    def light(colour: tuple[int, ...]) -> float:
        parts = [c / 255 / 12.92 if c / 255 <= 0.03928 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_told_from_the_paper_in_both_schemes():
    for scheme in page.STYLE.split(DARK):
        colours = {}
        for name, digits in re.findall(r"(--\w+): #(\w+)", scheme):
            whole = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
            colours[name] = tuple(int(whole[at : at + 2], 16) for at in (0, 2, 4))
        paper = colours["--paper"]
        assert contrast(colours["--ink"], paper) >= 7
        assert contrast(colours["--faint"], paper) >= 4.5
        for name in ("--spike", "--hot", "--right", "--wrong"):
            assert contrast(colours[name], paper) >= 3, name
        for layer in range(7):
            digits = spikes.depth_colour(layer, 7)[1:]
            assert contrast(tuple(int(digits[at : at + 2], 16) for at in (0, 2, 4)), paper) >= 3


def test_the_section_stays_small_for_a_deep_network_of_many_steps(run):
    """About the most that spikes.json may hold: all neurons fire, pictures of noise; 33 layers, and 150."""
    assert 10_000 < len(section(run)) < 60_000
    seen = seen_of(run)
    sample = {**seen["right"][0], "picture": "data:image/jpeg;base64," + "A" * 12_000}
    seen |= {"sample": sample, "right": [sample] * KEPT, "wrong": [sample] * KEPT}
    for layers in (6, 33, 150):
        most = min(MOST, max(FEWEST, ROWS // layers))
        T = min(STEPS, CELLS // (most * layers))
        layer = {"num_neurons": 10**6, "spikes": [10**6] * T, "shown": list(range(most)), "rows": ["1" * T] * most}
        seen |= {"layers": [layer] * layers, "num_steps": T}
        labels = layer_labels([f"layer{number}.0.downsample_sn" for number in range(layers)])
        journal = [{"step": step, "layer_gradient_norm": [0.5] * layers} for step in range(1000)]
        (run / "spikes.json").write_text(json.dumps(seen))
        text = "\n".join(spikes.parts(run, labels, journal))
        assert "cannot be read" not in text
        assert len(text) < 500_000
        assert sum(path.count("h") for path in re.findall(r'<path d="([^"]*)" class="spike"', text)) <= CELLS
