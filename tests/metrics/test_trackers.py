"""Trackers hold what the journal holds, read back by their own libraries, after a resume too."""

import dataclasses
import functools
import importlib.util
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.options import parse
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.metrics.trackers import Trackers, require
from tests.conftest import ROOT
from tests.support import tracked

LAYERS = ("sn1", "layer1.0.sn1")


def configured(name: str, run_dir: Path) -> Config:
    return parse(["--recipe", "digits", "--run_dir", str(run_dir), f"--metrics.{name}", "true"])


def record(step: int) -> dict:
    return {
        "step": step,
        "train_last_step_timestamp_seconds": 1.8e9 + step,
        "train_loss": 2.0 / step,
        "layer_chi": [0.25 * step, None],
    }


def evaluated(step: int) -> dict:
    return {"step": step, "eval_loss": 0.5, "eval_accuracy_ratio": 0.75}


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_run_that_was_killed_and_goes_on_has_the_journals_curves_and_no_step_twice(name, tmp_path):
    pytest.importorskip(name, reason=f"{name} is not installed: it is an extra")
    journal = [{"step": 0, "decision_log_width": [0.0, 0.0]}, record(1), record(2), evaluated(2), record(3)]
    code = (
        "import os, signal; from pathlib import Path; from tests.metrics import test_trackers as t; "
        f"first = t.Trackers(t.configured({name!r}, Path({str(tmp_path)!r})), t.LAYERS, []); "
        f"[first.write(each) for each in {journal!r}]; "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert any((tmp_path / name).rglob("*"))
    again = Trackers(configured(name, tmp_path), LAYERS, journal[:-1])  # from a checkpoint after step 2
    for step in (3, 4):
        again.write(record(step))
    again.close()
    read = {"tensorboard": tracked.tensorboard_curve, "wandb": tracked.wandb_curve, "mlflow": tracked.mlflow_curve}
    curve = functools.partial(read[name], tmp_path / name)
    assert curve("train_loss") == pytest.approx({1: 2.0, 2: 1.0, 3: 2 / 3, 4: 0.5})
    assert curve("layer_chi/00-sn1") == {1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0}
    assert curve("eval_accuracy_ratio") == {2: 0.75}


def test_a_tracker_that_is_not_asked_for_is_not_loaded(tmp_path):
    code = (
        "import sys; from launch.options import parse; from pipeline.metrics.trackers import Trackers; "
        f"Trackers(parse(['--recipe', 'digits', '--run_dir', {str(tmp_path)!r}]), ['a'], []).close(); "
        "assert not {'torch', 'tensorboard', 'wandb', 'mlflow'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_library_that_is_absent_is_refused_with_the_command_that_installs_it(name, tmp_path, monkeypatch):
    require(dataclasses.replace(configured(name, tmp_path), metrics=parse(["--recipe", "digits"]).metrics))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf'metrics.{name}=True needs {name}.*constraints.txt -e "\.\[{name}\]"'):
        require(configured(name, tmp_path))
