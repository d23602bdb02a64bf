"""What rank 0 writes and counts where a run begins anew, ends between two logged steps, or ends twice."""

import json
from pathlib import Path

import pytest
import torch

from launch.options import parse
from pipeline.chi.allreduce import Reading
from pipeline.chi.indicator import PER_LAYER, Indicators
from pipeline.data.loader import Figures
from pipeline.exporter import FOLDER_VARIABLE
from pipeline.metrics import read_journal
from pipeline.progress import Progress
from pipeline.rank_metrics import RankMetrics

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
        return Progress(
            config,
            rank=0,
            num_steps=100,
            step=step,
            layers=LAYERS,
            figures=lambda: Figures(0.0, 0, 0, {}, 16),
            loss_scale=lambda: None,
            exporter=exporter,
        )

    return after


def journal(folder: Path) -> list[dict]:
    return read_journal(folder / "metrics.jsonl")


def reading() -> Reading:
    halves = {name: torch.full((2,), 0.5, dtype=torch.float64) for name in PER_LAYER}
    return Reading(
        indicators=Indicators(**halves, network_chi=torch.tensor(1.0)),
        loss=torch.tensor(2.0),
        correct=torch.tensor(64),
        flags=torch.zeros(3),
        widths=torch.ones(2),
        skipped=False,
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
