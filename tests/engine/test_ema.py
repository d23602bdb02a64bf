"""The moving average of the weights: right at every ZeRO stage, swapped in and out, saved and resumed."""

import json
from pathlib import Path

import pytest
import torch

from launch import evaluate, export
from pipeline.config import TrainConfig
from pipeline.engine import load_network
from pipeline.engine.ema import decay_at
from pipeline.errors import ConfigError
from pipeline.run_dir import checkpoint_files
from pipeline.run_dir.run_folder import read
from pipeline.snn.networks.sew_resnet import SEWResNet
from tests.conftest import launch
from tests.engine.ema_ranks import CASES
from tests.support.rank_lines import told
from tests.support.training_runs import STEPS


@pytest.fixture(scope="module")
def cases() -> dict[str, dict]:
    done = launch("tests/engine/ema_ranks.py", ranks=2)
    assert done.returncode == 0, done.output
    lines = told(done.output, "CASE")
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("case", [f"{stage} {precision}" for stage, precision in CASES])
def test_the_average_is_of_whole_fp32_weights_and_evaluates_as_itself(case, cases):
    got = cases[case]
    assert got["off"] < 1e-6 < 1e-3 < got["moved"], "fp32 rounding of three steps, beside what the steps moved"
    assert got["shown is saved"]
    # Rounding in bf16 and fp16 may flip some spikes; a network of the last weights differs far more.
    assert got["answers"] <= (0.0 if case.endswith("fp32") else 0.5 * got["other answers"])
    assert got["other answers"] > 0
    assert got["last is back"]


@pytest.mark.parametrize("case", [f"{stage} {precision}" for stage, precision in CASES])
def test_an_engine_that_takes_the_average_over_goes_on_with_it_bit_for_bit(case, cases):
    assert cases[case]["resumed"]


@pytest.mark.parametrize("case", [f"{stage} {precision}" for stage, precision in CASES])
def test_what_is_saved_is_kept_by_the_rank_that_writes_and_later_steps_leave_it_alone(case, cases):
    assert cases[case]["rank 0 alone"]
    assert cases[case]["snapshot"], "the engines that were saved, and loaded from it, have made another step"


def test_the_share_that_stays_rises_to_the_decay():
    assert [decay_at(0.5, step) for step in (0, 1, 8, 1000)] == [0.1, 2 / 11, 0.5, 0.5]


def test_a_run_evaluates_and_exports_the_average_and_the_last_weights_on_demand(straight, tmp_path, capsys):
    config, saved = read(straight.run_dir).config, checkpoint_files.load_newest(straight.run_dir)
    assert saved is not None
    for weights, of in ((None, "ema"), ("ema", "ema"), ("last", "model")):
        network = load_network.load(straight.run_dir, config, weights=weights).network
        assert isinstance(network, SEWResNet)
        assert torch.equal(network.fc.weight, saved[of]["parameters"]["fc.weight"])
        assert network.bn1.running_mean is not None
        assert torch.equal(network.bn1.running_mean, saved[of]["buffers"]["bn1.running_mean"])
    assert not torch.equal(saved["ema"]["parameters"]["fc.weight"], saved["model"]["parameters"]["fc.weight"])
    evaluate.main([str(straight.run_dir), "--weights", "last", "--json", str(tmp_path / "last.json")])
    assert json.loads((tmp_path / "last.json").read_text())["weights"] == "last"
    assert not (straight.run_dir / "evaluations" / f"step-{STEPS:08d}-val.json").exists(), "they are not the run's"
    capsys.readouterr()
    export.main([str(straight.run_dir), str(tmp_path / "last.safetensors"), "--weights", "last"])
    card = Path(tmp_path / "last.safetensors.md").read_text(encoding="utf-8")
    assert "Weights after optimizer step" in card
    assert "not evaluated after this step" in card, "the run evaluated the average"
    export.main([str(straight.run_dir), str(tmp_path / "ema.safetensors")])
    card = (tmp_path / "ema.safetensors.md").read_text(encoding="utf-8")
    assert "Moving average of the weights after optimizer step" in card


def test_what_there_is_no_average_of_is_refused(straight, tmp_path):
    saved = checkpoint_files.load_newest(straight.run_dir)
    assert saved is not None
    checkpoint_files.save(tmp_path, STEPS, {**saved, "ema": None})
    with pytest.raises(ConfigError, match=r"keeps no moving average .*; use --weights last"):
        load_network.load(tmp_path, read(straight.run_dir).config, weights="ema")
    with pytest.raises(ConfigError, match=r"train.ema_decay=1.0 is not allowed; use a number in \[0, 1\)"):
        TrainConfig(ema_decay=1.0)
