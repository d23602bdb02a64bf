"""A run with every augmentation on, two ranks by the real launcher: a kill and a resume change no bit of it."""

import signal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from launch.options import parse
from pipeline.config import ModelConfig
from pipeline.data.loader import Loader
from pipeline.errors import EXIT_DONE
from pipeline.metrics.journal import read_journal
from pipeline.run_dir.checkpoint_files import load_newest
from pipeline.snn import losses
from pipeline.snn.networks import sew_resnet
from tests import golden
from tests.conftest import launch
from tests.support.training_runs import STEPS, arguments

ON = {
    "--data.aa": "rand-m9-mstd0.5-inc1",
    "--data.reprob": 0.5,
    "--data.mixup": 0.8,
    "--data.cutmix": 1.0,
    "--data.mixup_prob": 0.9,
}


def test_a_run_with_everything_on_that_is_killed_and_resumed_is_the_same_to_the_bit(digits, straight, tmp_path):
    words = [str(word) for pair in ON.items() for word in pair]
    whole = launch("launch/train.py", *arguments(digits, tmp_path / "whole"), *words)
    assert whole.returncode == EXIT_DONE, whole.output
    # SIGKILL to rank 0 with the second checkpoint half written; the launcher ends the other.
    killed = launch("tests/faults/fault_job.py", *arguments(digits, tmp_path / "cut"), *words, FAULT="0 SIGKILL save 2")
    assert killed.returncode == 256 - signal.SIGKILL, killed.output
    again = launch("launch/train.py", "--resume", str(tmp_path / "cut"))
    assert again.returncode == EXIT_DONE, again.output
    assert "resumed from the checkpoint after step" in again.output
    journals = [read_journal(folder / "metrics.jsonl") for folder in (tmp_path / "whole", tmp_path / "cut")]
    seen = [
        [(r["step"], r["train_loss"], r["train_accuracy_ratio"]) for r in journal if "train_loss" in r]
        for journal in journals
    ]
    assert [step for step, _, _ in seen[0]] == list(range(1, STEPS + 1))
    assert seen[0] == seen[1]
    plain = [r["train_loss"] for r in read_journal(straight.run_dir / "metrics.jsonl") if "train_loss" in r]
    assert all(loss != other for (_, loss, _), other in zip(seen[0], plain, strict=True)), "nothing was augmented"
    weights = [load_newest(folder) for folder in (tmp_path / "whole", tmp_path / "cut")]
    assert weights[0] is not None
    assert weights[1] is not None
    for name, value in weights[0]["model"]["parameters"].items():
        assert torch.equal(weights[1]["model"]["parameters"][name], value), name


def test_the_loss_and_accuracy_of_a_step_are_those_of_its_mixed_batches(digits, tmp_path):
    """In doubles, the first step of two ranks against the same batches through the same network here."""
    network = sew_resnet.build(ModelConfig(arch="sew_tiny", neuron="plif", T=golden.T), num_classes=10, image_size=8)
    network = network.double()
    golden.fill(network)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    words = golden.arguments(digits, tmp_path / "weights.safetensors", tmp_path / "run")
    words += ["--train.epochs", "0.01", "--data.mixup", "5", "--data.cutmix", "1"]
    ended = launch("launch/train.py", *words)
    assert ended.returncode == EXIT_DONE, ended.output
    (record,) = [r for r in read_journal(tmp_path / "run" / "metrics.jsonl") if "train_loss" in r]
    config = parse(words)
    loader = Loader(config.data, seed=0, rank=0, world_size=1, device=torch.device("cpu"), dtype=torch.float64)
    wanted, with_labels, hits = [], [], []
    for batch in next(loader.steps(0, 1)):
        logits = network(batch.images)
        wanted.append(losses.loss(config.train, logits, batch.targets).item())
        with_labels.append(losses.loss(config.train, logits, batch.labels).item())
        hits.append((logits.mean(0).argmax(1) == batch.labels).double().mean().item())
    loader.close()
    assert record["train_loss"] == pytest.approx(np.mean(wanted), rel=1e-6)
    assert record["train_accuracy_ratio"] == pytest.approx(np.mean(hits))
    assert abs(np.mean(with_labels) / np.mean(wanted) - 1) > 1e-4, "mixed targets make a difference"
