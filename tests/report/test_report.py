"""The page of one run, and of several: it shows what differs and nothing else, and has every curve."""

import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib import pyplot as plt

from pipeline.metrics.journal import layer_labels, read_journal
from pipeline.report import comparison, page, report
from tests.conftest import ROOT

PHONE = 400 - 32  # pixels that a picture has on a page of 400, beside its margins


@pytest.fixture(autouse=True)
def _no_figure_is_left():
    yield
    plt.close("all")


@pytest.fixture
def runs(straight, tmp_path) -> list[Path]:
    """The finished run, and a copy that says it had another learning rate and was better at its end."""
    folders = [Path(shutil.copytree(straight.run_dir, tmp_path / name)) for name in ("first", "second")]
    config = json.loads((folders[1] / "config.json").read_text())
    config["optim"]["lr"], config["metrics"]["port"] = 0.125, 1
    (folders[1] / "config.json").write_text(json.dumps(config))
    journal = read_journal(folders[1] / "metrics.jsonl")
    journal[-1] |= {"eval_accuracy_ratio": 0.987, "eval_loss": None}
    (folders[1] / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in journal))
    return folders


def cells(page: str, name: str) -> list[str]:
    """The row of that name, in a table of the page."""
    row = re.search(rf"<tr><th>{re.escape(html.escape(name))}((?:<td>[^<]*)+)", page)
    assert row, name
    return row[1].split("<td>")[1:]


def test_two_runs_side_by_side(runs, tmp_path, capsys):
    assert report.main([*map(str, runs), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    first = json.loads((runs[0] / "summary.json").read_text())
    assert cells(text, "validation accuracy") == [f"{100 * first['eval_accuracy_ratio']:.2f} %", "98.70 %"]
    assert cells(text, "validation loss, nats") == [f"{first['eval_loss']:.4f}", "-"]
    assert cells(text, "last logged step") == ["14", "14"]
    assert cells(text, "optim.lr") == ["0.4", "0.125"]
    for same in ("model.T", "metrics.port", "commit", "run_dir"):
        assert f"<th>{same}<" not in text
    assert text.count("data:image/png;base64,") == 4 + 2 * 3
    assert "http" not in text


def test_two_runs_are_compared_layer_by_layer(runs, tmp_path):
    journal = read_journal(runs[1] / "metrics.jsonl")
    last = next(record for record in reversed(journal) if "layer_chi" in record)
    last |= {"layer_surrogate_width": [4.0] * len(last["layer_chi"]), "layer_coverage_ratio": [None] * 6}
    (runs[1] / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in journal))
    about = json.loads((runs[1] / "run.json").read_text())
    about["layers"][-1] = "other.sn"
    (runs[1] / "run.json").write_text(json.dumps(about))
    text = comparison.write(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    ours = report.last_training_record(runs[0])
    width, coverage, chi = (ours[f"layer_{name}"][0] for name in ("surrogate_width", "coverage_ratio", "chi"))
    first = layer_labels(about["layers"])[0]
    assert cells(text, first) == [f"{width:.3f}", "4.000", f"{coverage:.3f}", "-", f"{chi:.3f}", "1.000"]
    assert cells(text, "05-other.sn")[::2] == ["-"] * 3, "the first run has no such layer"
    maps = comparison.layer_maps(comparison.read(runs), "layer_surrogate_width")
    scales = {figure.axes[0].collections[0].get_clim() for figure in maps.values()}
    (scale,) = scales
    assert len(maps) == 2
    assert scale[1] == 4


def test_every_run_has_curves_of_its_own_colour_in_all_four_pictures(runs):
    several = comparison.read([*runs, runs[0]])
    assert len({run.name for run in several[:2]}) == 2
    assert several[0].colour != several[1].colour
    pictures = comparison.curves(several[:2])
    for figure in pictures.values():
        (axes,) = figure.axes
        assert {line.get_color() for line in axes.get_lines()} == {run.colour for run in several[:2]}
    training = pictures["cross-entropy, nats of the runs"].axes[0].get_lines()[0].get_ydata()
    assert list(np.asarray(training)) == [record["train_loss"] for record in several[0].training]


def test_runs_of_one_name_are_told_apart_by_their_path(runs, tmp_path):
    other = shutil.copytree(runs[0], tmp_path / "elsewhere" / "first")
    assert [run.name for run in comparison.read([runs[0], Path(other)])] == [str(runs[0]), str(other)]


def test_a_folder_may_have_any_name(runs, tmp_path):
    odd = Path(shutil.copytree(runs[0], tmp_path / "a$_{b$ <i>&amp; % χ"))
    text = comparison.write([runs[0], odd], tmp_path / "page.html").read_text(encoding="utf-8")
    assert html.escape(odd.name) in text
    assert "<i>" not in text
    assert report.main([str(odd)]) == 0


def test_twelve_runs_have_twelve_colours(runs):
    assert len({run.colour for run in comparison.read([runs[0]] * 12)}) == 12


def test_the_running_mean_passes_over_what_is_not_finite():
    values = np.array([np.nan, 1.0, 3.0] + [5.0] * 57)
    assert np.allclose(comparison.running_mean(values)[:5], [np.nan, 1.0, 2.0, 3.0, 13 / 3], equal_nan=True)


def test_one_run_has_its_report_and_a_folder_without_a_run_is_named(runs, tmp_path, capsys):
    (runs[0] / "report.html").unlink()
    assert report.main([str(runs[0])]) == 0
    text = (runs[0] / "report.html").read_text(encoding="utf-8")
    assert text.count("<img alt=") == 4 + 6
    assert "&quot;recipe&quot;: &quot;digits&quot;" in text
    assert f"python -m launch.evaluate {runs[0]}</code> adds it here" in text
    assert report.main([str(runs[0]), str(tmp_path)]) == 64
    assert f"{tmp_path} holds no run with a logged step" in capsys.readouterr().err
    assert report.main([*map(str, runs), "--replay"]) == 64
    for name, content, said in (("run.json", "{", "cannot be read"), ("config.json", None, "cannot be read (")):
        capsys.readouterr()
        damaged = Path(shutil.copytree(runs[0], tmp_path / f"damaged-{name}"))
        (damaged / name).write_text(content) if content else (damaged / name).unlink()
        assert report.main([str(runs[0]), str(damaged)]) == 64
        told = capsys.readouterr().err
        assert f"{damaged / name} {said}" in told
        assert told.count("\n") == 1
    assert report.main([*map(str, runs), "--out", str(tmp_path / "nowhere/page.html")]) == 64
    assert "cannot be written (No such file or directory); choose another place" in capsys.readouterr().err


def test_the_curves_of_a_run_with_its_evaluations_joined(runs):
    journal = read_journal(runs[0] / "metrics.jsonl")
    training = [record for record in journal if "train_loss" in record]
    training[3] |= {"eval_loss": None, "eval_accuracy_ratio": 0.25}  # of an evaluation whose loss was not finite
    (runs[0] / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in journal))
    pictures = report.curves(runs[0])
    for name, ylabel in (("learning_rate", "learning rate"), ("images_per_second", "images/s, all ranks")):
        (line,) = pictures[f"{ylabel} over steps"].axes[0].get_lines()
        assert list(np.asarray(line.get_xdata())) == [record["step"] for record in training]
        assert list(np.asarray(line.get_ydata())) == [record[f"train_{name}"] for record in training]
    line = pictures["top-1 accuracy, % over steps"].axes[0].get_lines()[1]
    assert (line.get_linestyle(), line.get_marker()) == ("-", "o")
    assert np.asarray(line.get_ydata())[0] == 25
    assert np.isnan(np.asarray(pictures["cross-entropy, nats over steps"].axes[0].get_lines()[1].get_ydata())[0])


def drawn(values: list[list[float | None]], name: str, labels: list[str]):
    """A map of these values, a list for each record, with its own scale."""
    records = [{"step": step, name: value} for step, value in enumerate(values, 1)]
    return page.layer_map(records, labels, name, page.scale_of(name, [page.layer_values(records, name)]))


def test_the_scale_of_chi_is_0_to_1_and_what_is_below_its_alert_is_red():
    figure = drawn([[1.0, 0.9], [1.0, 0.15]], "layer_chi", ["00-a", "01-b"])
    mesh = figure.axes[0].collections[0]
    assert mesh.get_clim() == (0, 1)
    rules = yaml.safe_load((ROOT / "k8s/monitoring/rules.yml").read_text())["groups"][0]["rules"]
    (alert,) = [rule["expr"] for rule in rules if rule.get("alert") == "SnnChiLow"]
    assert re.search(r"snn_layer_chi < (\S+)", alert)[1] == f"{page.CHI_ALERT:g}"  # pyright: ignore
    bar = figure.axes[1]
    assert page.CHI_ALERT in [line.get_ydata()[0] for line in bar.get_lines()]  # pyright: ignore
    assert "0.2 alert" in [tick.get_text() for tick in bar.get_yticklabels()]

    def is_red(value: float) -> bool:
        red, green, blue, _ = mesh.to_rgba(np.array([value]))[0]
        return red > green + 0.2 and red > blue + 0.2

    assert [is_red(value) for value in (0.0, 0.1, 0.19, 0.21, 0.5, 0.9, 1.0)] == [True] * 3 + [False] * 4


def test_other_scales_follow_the_values_and_a_value_that_stays_has_one_colour():
    assert page.scale_of("layer_chi", [np.array([[0.9, 1.0]])]) == (0, 1)
    assert page.scale_of("layer_coverage_ratio", [np.array([[0.2, np.nan]]), np.array([[0.5]])]) == (0.2, 0.5)
    low, high = page.scale_of("layer_surrogate_width", [np.array([[0.25, 0.25]])])
    assert low < 0.25 < high
    figure = drawn([[None, None]], "layer_coverage_ratio", ["00-a", "01-b"])
    assert [text.get_text() for text in figure.axes[0].texts] == ["not defined for this surrogate"]


@pytest.mark.parametrize("num_layers", [6, 33, 150])
def test_names_of_layers_can_be_read_on_a_phone(num_layers):
    labels = layer_labels([f"layer{layer}.0.downsample_sn" for layer in range(num_layers)])
    figure = drawn([[0.5] * num_layers], "layer_coverage_ratio", labels)
    figure.draw_without_rendering()
    pixels = PHONE / figure.get_figwidth()  # an inch of the figure
    axes = figure.axes[0]
    ticks = axes.get_yticklabels()
    assert [tick.get_text()[:10] for tick in ticks] == [label[:10] for label in labels]
    assert all(float(tick.get_fontsize()) / 72 * pixels >= 9 for tick in ticks)
    rows = axes.get_position().height * figure.get_figheight() * pixels / num_layers
    assert rows >= 9, "the names would cover one another"
    assert axes.get_position().width > 0.35, "the names leave no room"


def test_the_newest_evaluation_of_every_split_stands_in_the_report(runs):
    folder = runs[0] / "evaluations"
    folder.mkdir(exist_ok=True)
    pair = {"class": "tench <3>", "answered": "goldfish", "num_samples": 7, "of_class_ratio": 0.14}
    base = {"weights": "ema", "num_samples": 1234, "eval_accuracy_ratio": 0.5, "eval_loss": None, "confused": [pair]}
    for step, split, more in (
        (9, "val", {"eval_accuracy_ratio": 0.1}),
        (14, "val", {}),
        (10, "extra-set", {"confused": []}),
    ):
        path = folder / f"step-{step:08d}-{split}.json"
        path.write_text(json.dumps({"step": step, "split": split, **base, **more}))
    val, extra = sorted(report.evaluations(runs[0]), key=len, reverse=True)
    assert "Split val after step 14, averaged weights: 50.00 % of 1,234 samples right, loss not finite." in val
    assert cells(val, "tench <3> → goldfish") == ["7", "14.0 %"]
    assert "No class was taken for another" in extra
    path = folder / "step-00000014-val.json"
    for text, said in (("{", "cannot be read"), ("[]", "cannot be read"), ("{}", "cannot be read")):
        path.write_text(text)
        assert any(said in part and "step-00000014-val.json" in part for part in report.evaluations(runs[0]))
    path.write_text(json.dumps({"step": 14, "split": "val", **{k: v for k, v in base.items() if k != "confused"}}))
    assert any("Evaluate again to see which classes" in part for part in report.evaluations(runs[0]))
