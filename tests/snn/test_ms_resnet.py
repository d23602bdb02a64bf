"""MS-ResNet through the launcher, on two ranks: measured, resumed bit for bit, evaluated, exported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from launch import evaluate, export
from pipeline.errors import EXIT_DONE, ConfigError
from pipeline.metrics.journal import read_journal
from pipeline.run_dir.checkpoint_files import load_newest
from pipeline.run_dir.run_folder import evaluation_path
from tests.conftest import launch
from tests.support.training_runs import STEPS, arguments

MODEL = ["--model.arch", "ms_tiny", "--model.neuron", "plif", "--model.checkpoint", "true", "--model.width", "2"]


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("ms") / "run"
    done = launch("launch/train.py", *arguments(digits, run_dir), *MODEL)
    assert done.returncode == EXIT_DONE, done.output
    return run_dir


def losses(run_dir: Path) -> list[float]:
    return [r["train_loss"] for r in read_journal(run_dir / "metrics.jsonl") if "train_loss" in r]


def test_every_layer_shows_its_indicators(run):
    records = [r for r in read_journal(run / "metrics.jsonl") if "layer_chi" in r]
    names = json.loads((run / "run.json").read_text())["layers"]
    assert names == ["layer1.0.sn1", "layer1.0.sn2", "layer2.0.sn1", "layer2.0.sn2", "sn_out"]
    for indicator in ("layer_chi", "layer_coverage_ratio", "layer_firing_rate_ratio"):
        assert all(0 < value <= 1 for r in records for value in r[indicator]), indicator


def test_a_resumed_run_repeats_every_bit(run, digits, tmp_path):
    again = Path(shutil.copytree(run, tmp_path / "run"))
    (again / "summary.json").unlink()
    shutil.rmtree(again / "checkpoints" / f"step-{STEPS:08d}")
    done = launch("launch/train.py", *arguments(digits, again), *MODEL)
    assert done.returncode == EXIT_DONE, done.output
    assert "resumed from the checkpoint after step 10" in done.output
    assert losses(again) == losses(run)
    ours, theirs = load_newest(again), load_newest(run)
    assert ours is not None
    assert theirs is not None
    assert ours["step"] == theirs["step"] == STEPS
    for kind in ("parameters", "buffers"):
        for name, tensor in theirs["model"][kind].items():
            assert torch.equal(ours["model"][kind][name], tensor), name
    assert torch.equal(ours["widths"]["log_width"], theirs["widths"]["log_width"])


def test_an_evaluation_tells_spikes_from_currents(run, digits, tmp_path, capsys):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    evaluate.main([str(copy)])
    layers = json.loads(evaluation_path(copy, STEPS, "val").read_text())["energy"]["layers"]
    found = {layer["layer"]: layer for layer in layers}
    analog = {name for name, layer in found.items() if layer["macs"]}
    assert analog == {"conv1", "layer2.0.downsample.0"}
    assert all(layer["acs"] > 0 for name, layer in found.items() if name not in analog)
    feeds = {name: layer["neurons"] for name, layer in found.items()}
    assert feeds == {
        "conv1": "layer1.0.sn1",
        "layer1.0.conv1": "layer1.0.sn2",
        "layer1.0.conv2": "layer2.0.sn1",
        "layer2.0.downsample.0": None,
        "layer2.0.conv1": "layer2.0.sn2",
        "layer2.0.conv2": "sn_out",
        "fc": None,
    }


def test_an_export_has_our_names_alone(run, tmp_path):
    out = tmp_path / "net.safetensors"
    with pytest.raises(ConfigError, match=r"--names original is not allowed with model\.arch='ms_tiny': .* ours"):
        export.main([str(run), str(out), "--names", "original"])
    export.main([str(run), str(out)])
    with safe_open(out, "pt") as file:
        assert {"conv1.weight", "layer2.0.downsample.1.bias", "sn_out.w", "fc.bias"} <= set(file.keys())
