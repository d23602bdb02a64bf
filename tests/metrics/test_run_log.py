"""What rank 0 writes and counts where a run begins anew, ends between two logged steps, or ends twice, and how
a line of progress looks."""

import io
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from launch.options import parse
from pipeline.chi.indicators import PER_LAYER, Indicators
from pipeline.chi.tap import Reading
from pipeline.data.loader import Figures
from pipeline.metrics.exporter import FOLDER_VARIABLE
from pipeline.metrics.journal import COLUMNS, coloured, progress_line, read_journal
from pipeline.metrics.rank_metrics import RankMetrics
from pipeline.metrics.run_log import RunLog
from pipeline.run_dir.rank_log import Tee
from tests.conftest import ROOT

PACE = """
import sys, torch
import torch.distributed as dist
from pipeline.ranks.straggler import Straggler
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
made = []
pace = Straggler(torch.nn.Identity(), torch.device("cpu"), every=2, step=0, waited=lambda: 7.0 * len(made), say=print)
for step in range(1, 9):
    made.append(step)
    pace.after_step(step)
dist.barrier()
dist.destroy_process_group()
"""
LAYERS = ["first", "second"]


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Makes the RunLog of a process that continues after a step; its metrics lie in `tmp_path`."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    config = parse(["--recipe", "digits", "--run_dir", str(tmp_path), "--train.log_every", "5"])

    def after(step: int, waited: Callable[[], float] = lambda: 0.0) -> RunLog:
        exporter = RankMetrics(
            config, rank=0, local_rank=0, world_size=1, layers=LAYERS, num_steps=100, identity="0" * 64
        )
        return RunLog(
            config,
            rank=0,
            num_samples=426,  # 100 steps
            step=step,
            layers=LAYERS,
            figures=lambda: Figures(waited(), 0, 0, {}, 16),
            loss_scale=lambda: None,
            exporter=exporter,
        )

    return after


def journal(folder: Path) -> list[dict]:
    return read_journal(folder / "metrics.jsonl")


def reading(correct: int = 64, nonfinite: str = "") -> Reading:
    halves = {name: torch.full((2,), 0.5, dtype=torch.float64) for name in PER_LAYER}
    return Reading(
        indicators=Indicators(**halves, network_chi=torch.tensor(1.0)),
        loss=torch.tensor(2.0),
        correct=torch.tensor(correct),
        flags=torch.zeros(3),
        widths=torch.ones(2),
        skipped=bool(nonfinite),
        nonfinite=nonfinite,
    )


def test_a_run_that_begins_anew_begins_an_empty_journal(begin, tmp_path):
    """It was killed before its first checkpoint."""
    for _ in range(2):
        progress = begin(0)
        progress.began(torch.zeros(2))
        progress.close()
    assert journal(tmp_path) == [{"step": 0, "decision_log_width": [0.0, 0.0]}]


def test_the_last_evaluation_is_written_once(begin, tmp_path):
    """The first process was killed before its summary."""
    for after in (0, 100):
        progress = begin(after)
        progress.evaluated(100, 0.5, 0.75, 300, 1.0)
        progress.close()
    assert journal(tmp_path) == [{"step": 100, "eval_loss": 0.5, "eval_accuracy_ratio": 0.75}]


def test_an_end_between_two_logged_steps_shows_the_last_save_and_all_steps(begin, tmp_path):
    progress = begin(0)
    for number in range(1, 8):
        progress.step(number, reading(), None, 0.1)
    progress.saved(7, 1.5)
    progress.close()
    shown = json.loads((tmp_path / "rank-0.json").read_text())
    assert shown["train_steps"][0][-1] == 7
    assert shown["train_samples"][0][-1] == 7 * 128
    assert ["success", 1] in [row[-2:] for row in shown["checkpoint_saves"]]
    assert shown["checkpoint_duration_seconds"][0][-1] == 1.5


def test_the_accuracy_is_of_all_samples_since_the_last_line_and_the_epoch_is_shown(begin, tmp_path, capsys):
    progress = begin(0)
    for number in range(1, 11):
        progress.step(number, reading(correct=number), None, 0.1)
    progress.step(11, reading(correct=128), None, 0.1)
    progress.step(12, reading(correct=100, nonfinite="the loss"), None, 0.1)  # its logits say nothing
    for number in (13, 14, 15):
        progress.step(number, reading(correct=128), None, 0.1)
    progress.close()
    shares = [record["train_accuracy_ratio"] for record in journal(tmp_path) if "train_loss" in record]
    assert shares == [(1 + 2 + 3 + 4 + 5) / (5 * 128), (6 + 7 + 8 + 9 + 10) / (5 * 128), 1.0]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [re.findall(r"epoch +(\S+) .* acc +(\S+) ", line) for line in lines] == [
        [("1.5", "2.34%")],  # 5 x 128 of 426 samples
        [("3.0", "6.25%")],
        [("4.5", "100%")],
    ]


def test_where_no_step_since_the_last_line_was_finite_there_is_no_accuracy(begin, tmp_path, capsys):
    progress = begin(0)
    for number in range(1, 6):
        progress.step(number, reading(nonfinite="the loss"), None, 0.1)
    progress.close()
    assert [record["train_accuracy_ratio"] for record in journal(tmp_path) if "train_loss" in record] == [None]
    assert "acc  nan%" in capsys.readouterr().out


def test_the_sums_of_steps_that_are_not_logged_stay_on_the_device(begin, monkeypatch):
    """A step that waits for the device costs its whole queue."""
    progress = begin(0)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("the host waits"))
    for number in range(1, 5):
        progress.step(number, reading(), None, 0.1)


NUMBER = st.floats(allow_nan=True, allow_infinity=True)
SHARE = st.floats(0, 1) | st.just(math.nan)
LAYER_VALUES = st.lists(SHARE, min_size=1, max_size=200)
TYPICAL = {
    "step": 50,
    "train_loss": 1.23456,
    "train_accuracy_ratio": 0.7766,
    "train_images_per_second": 1421.2,
    "data_wait_ratio": 0.001,
    "layer_chi": [1.0, 0.9981],
    "layer_coverage_ratio": [0.31, 0.3222],
    "layer_surrogate_width": [0.894, 1.17],
}


@given(
    record=st.fixed_dictionaries(
        {
            "step": st.integers(1, 9_999_999),
            "train_loss": NUMBER,
            "train_accuracy_ratio": SHARE,
            "train_images_per_second": st.floats(1e-6, 1e9),
            "data_wait_ratio": st.floats(0, 1),
            "layer_chi": LAYER_VALUES,
            "layer_coverage_ratio": LAYER_VALUES,
            "layer_surrogate_width": st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=200),
        },
        optional={"train_image_size_pixels": st.integers(8, 4096)},
    ),
    num_steps=st.integers(1, 9_999_999),
    epoch=st.floats(0, 1e5),
    eta_s=st.floats(0, 1e12) | st.just(math.nan) | st.just(math.inf),
)
@example(record=TYPICAL | {"step": 123_456, "train_loss": math.nan}, num_steps=654_321, epoch=99.0, eta_s=4e6)
def test_a_line_of_progress_fits_and_says_what_matters_most(record, num_steps, epoch, eta_s):
    line = progress_line(record, num_steps, epoch, eta_s)
    assert len(line) <= COLUMNS == 110
    shown = r"step +\d+/\d+  epoch +\S+  loss +\S+  acc +\S+%  .*\S+ img/s  .*ETA \S+"
    assert re.fullmatch(shown, line), line
    assert "wait" in line or record["data_wait_ratio"] < 0.05


@pytest.mark.parametrize(
    ("changed", "num_steps", "eta_s", "parts"),
    [
        ({}, 338, 33.9, "step  50/338|epoch 4.4|loss 1.2346|acc 77.7%|χ 0.998|cov 0.31–0.32|width 0.89–1.17|ETA 33s"),
        ({"train_images_per_second": 0.0173}, 338, 3600 * 123 + 62, "0.02 img/s|ETA 5d03h"),
        ({"train_images_per_second": 123_456.0}, 338, 3600 * 3 + 62, "123k img/s|ETA 3h01m"),
        ({"train_loss": math.nan, "train_accuracy_ratio": 0.0}, 338, 125, "loss    nan|acc 0.00%|ETA 2m"),
        ({"train_loss": 123456.7, "data_wait_ratio": 0.12}, 338, 1, "loss 123457|wait 12%|cov 0.31–0.32"),
        ({"layer_coverage_ratio": [math.nan] * 2, "train_image_size_pixels": 224}, 10**6, 1, "width 0.89–1.17|224²"),
        ({}, 1_601_460, 4e5, "step      50/1601460|cov 0.31–0.32|width 0.89–1.17|ETA 4d15h"),
    ],
)
def test_what_a_line_of_progress_holds(changed, num_steps, eta_s, parts):
    line = progress_line(TYPICAL | changed, num_steps, 4.4, eta_s)
    for part in parts.split("|"):
        assert part in line.split("  ") or part in line, line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_is_for_a_terminal_alone_and_never_for_the_log():
    lines = [progress_line(TYPICAL, 338, 4.4, 33.0), "validation after step 50: 98.89 % of 359 samples, loss 0.1"]
    for line in lines:
        painted = coloured(line, Terminal(), {"TERM": "xterm"})
        assert painted != line
        assert re.sub("\033\\[[0-9;]*m", "", painted) == line
        assert coloured(line, io.StringIO(), {"TERM": "xterm"}) == line
        assert coloured(line, Terminal(), {"TERM": "xterm", "NO_COLOR": "1"}) == line
        assert coloured(line, Terminal(), {"TERM": "dumb"}) == line
        assert coloured(line, Terminal(), {"NO_COLOR": ""}) == painted
        console, file = Terminal(), io.StringIO()
        Tee(console, file, shown=True).write(painted + "\n")
        assert console.getvalue() == painted + "\n"
        assert file.getvalue().endswith(f" {line}\n")
    plain = "rank 0: SIGINT: the run stops within two steps, with a checkpoint"
    assert coloured(plain, Terminal(), {}) == plain


def test_the_data_wait_is_that_since_the_last_logged_step(begin, tmp_path):
    made = []
    progress = begin(0, waited=lambda: 7.0 * len(made))
    for number in range(1, 16):
        made.append(number)
        progress.step(number, reading(), None, 0.1)
    progress.close()
    records = [record for record in journal(tmp_path) if "train_loss" in record]
    waited_s = [r["data_wait_ratio"] * 5 * 128 / r["train_images_per_second"] for r in records]
    assert waited_s == pytest.approx([35.0, 35.0, 35.0])


def test_a_rank_tells_what_it_waited_since_it_last_told(tmp_path):
    command = [sys.executable, "-c", PACE, str(tmp_path / "meet")]
    ranks = [
        subprocess.Popen(
            [*command, rank], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    _, told = (rank.communicate(timeout=100)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert re.findall(r"^step (\d): ([\d.]+) ms a step", told, re.MULTILINE) == [(n, "7000.0") for n in "2468"]
