"""What rank 0 writes and counts where a run begins anew, ends between two logged steps, or ends twice."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launch.options import parse
from pipeline.chi.indicators import PER_LAYER, Indicators
from pipeline.chi.tap import Reading
from pipeline.data.loader import Figures
from pipeline.metrics.exporter import FOLDER_VARIABLE
from pipeline.metrics.journal import read_journal
from pipeline.metrics.rank_metrics import RankMetrics
from pipeline.metrics.run_log import RunLog
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
