"""Several runs on one page: what differs is told, what does not is not, and their curves are all in the picture."""

import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline import comparison, report
from pipeline.metrics import read_journal


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
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    first = json.loads((runs[0] / "summary.json").read_text())
    assert cells(page, "validation accuracy") == [f"{100 * first['eval_accuracy_ratio']:.2f} %", "98.70 %"]
    assert cells(page, "validation loss, nats") == [f"{first['eval_loss']:.4f}", "-"]
    assert cells(page, "last logged step") == ["14", "14"]
    assert cells(page, "optim.lr") == ["0.4", "0.125"]
    for same in ("model.T", "metrics.port", "commit", "run_dir"):
        assert f"<th>{same}<" not in page
    assert page.count("data:image/png;base64,") == 1
    assert "http" not in page


def test_every_run_has_curves_of_its_own_colour_in_all_four_pictures(runs):
    several = comparison.read([*runs, runs[0]])
    assert len({run.name for run in several[:2]}) == 2
    assert several[0].colour != several[1].colour
    figure = comparison.curves(several[:2])
    for axes in figure.axes:
        assert {line.get_color() for line in axes.get_lines()} == {run.colour for run in several[:2]}
    training = figure.axes[0].get_lines()[0].get_ydata()
    assert list(np.asarray(training)) == [record["train_loss"] for record in several[0].training]


def test_runs_of_one_name_are_told_apart_by_their_path(runs, tmp_path):
    other = shutil.copytree(runs[0], tmp_path / "elsewhere" / "first")
    assert [run.name for run in comparison.read([runs[0], Path(other)])] == [str(runs[0]), str(other)]


def test_twelve_runs_have_twelve_colours(runs):
    assert len({run.colour for run in comparison.read([runs[0]] * 12)}) == 12


def test_the_running_mean_passes_over_what_is_not_finite():
    values = np.array([np.nan, 1.0, 3.0] + [5.0] * 57)
    assert np.allclose(comparison.running_mean(values)[:5], [np.nan, 1.0, 2.0, 3.0, 13 / 3], equal_nan=True)


def test_one_run_has_its_report_and_a_folder_without_a_run_is_named(runs, tmp_path, capsys):
    (runs[0] / "report.html").unlink()
    assert report.main([str(runs[0])]) == 0
    page = (runs[0] / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert "&quot;recipe&quot;: &quot;digits&quot;" in page
    assert report.main([str(runs[0]), str(tmp_path)]) == 64
    assert f"{tmp_path} holds no run with a logged step" in capsys.readouterr().err
    assert report.main([*map(str, runs), "--replay"]) == 64
