"""What rank 0 writes and counts where a run begins anew, ends between two logged steps, or ends twice."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.options import parse
from pipeline.chi.allreduce import Reading
from pipeline.chi.controller import start
from pipeline.chi.indicator import PER_LAYER, Indicators
from pipeline.data.loader import Figures
from pipeline.exporter import FOLDER_VARIABLE
from pipeline.metrics import read_journal
from pipeline.progress import Progress, Step
from pipeline.rank_metrics import RankMetrics
from tests.conftest import ROOT

PACE = """
import sys, torch
import torch.distributed as dist
from pipeline.pace import Pace
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
pace = Pace(torch.nn.Identity(), torch.device("cpu"), every=2, step=0, say=print)
for step in range(1, 9):
    pace.step(step, 7.0 * step)
dist.barrier()
dist.destroy_process_group()
"""
LAYERS = ["first", "second"]


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Progress of a process that goes on after a step; its metrics lie in `tmp_path`."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    config = parse(["--recipe", "digits", "--run_dir", str(tmp_path), "--train.log_every", "5"])

    def after(step: int) -> Progress:
        exporter = RankMetrics(
            config, rank=0, local_rank=0, world_size=1, layers=LAYERS, num_steps=100, identity="0" * 64
        )
        return Progress(config, rank=0, num_steps=100, step=step, layers=LAYERS, exporter=exporter)

    return after


def journal(folder: Path) -> list[dict]:
    return read_journal(folder / "metrics.jsonl")


def step(number: int, wait_s: float = 0.0) -> Step:
    halves = {name: torch.full((2,), 0.5, dtype=torch.float64) for name in PER_LAYER}
    reading = Reading(
        indicators=Indicators(**halves, network_chi=torch.tensor(1.0)),
        loss=torch.tensor(2.0),
        correct=torch.tensor(64),
        signals=torch.zeros(3),
        skipped=False,
    )
    return Step(number, reading, torch.ones(2), 0.1, None, Figures(wait_s, 0, 0, {}, 16))


def test_a_run_that_begins_anew_begins_an_empty_journal(begin, tmp_path):
    """It was killed before its first checkpoint."""
    for _ in range(2):
        progress = begin(0)
        progress.began(start(torch.ones(2)))
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
        progress.step(step(number))
    progress.saved(7, 1.5)
    progress.close()
    shown = json.loads((tmp_path / "rank-0.json").read_text())
    assert shown["train_steps"][0][-1] == 7
    assert shown["train_samples"][0][-1] == 7 * 128
    assert ["success", 1] in [row[-2:] for row in shown["checkpoint_saves"]]
    assert shown["checkpoint_duration_seconds"][0][-1] == 1.5


def test_the_data_wait_is_that_since_the_last_logged_step(begin, tmp_path):
    progress = begin(0)
    for number in range(1, 16):
        progress.step(step(number, wait_s=7.0 * number))
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
