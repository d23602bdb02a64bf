"""`--dry-run` says what would be trained, and trains nothing."""

import dataclasses
import json
import statistics
import subprocess
import sys

import pytest
import torch

from launch import epoch_time
from launch.dry_run import memory, report
from launch.options import parse
from launch.recipes import RECIPES
from pipeline.config import OptimConfig, TrainConfig
from pipeline.data.manifest import Manifest
from pipeline.errors import ConfigError
from pipeline.metrics.journal import read_journal
from pipeline.snn.networks.build import build
from tests.conftest import ROOT
from tests.support import training_runs


def test_a_dry_run_describes_the_run_and_leaves_nothing(digits, tmp_path):
    arguments = ["--recipe", "digits", "--data.path", str(digits), "--run-dir", str(tmp_path / "run")]
    command = [sys.executable, "launch/train.py", *arguments, "--dry-run", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    config, samples = parse(arguments), Manifest.load(digits / "train").num_samples
    said = done.stdout
    assert f"run_dir = {config.run_dir!r}" in said
    assert "batch       128 = 4 ranks x 2 micro-batches x 16" in said
    assert f"steps       {config.num_steps(samples)}: 30 epochs of {samples} samples" in said
    settings = json.loads(said[said.index("DeepSpeed\n") + len("DeepSpeed\n") : said.index("\nbatch ")])
    assert settings["gradient_accumulation_steps"] == 2
    network = build(config.model, num_classes=10, image_size=16)
    assert f"parameters  {sum(p.numel() for p in network.parameters()):,} (10 classes)" in said
    assert not (tmp_path / "run").exists()


def test_the_time_is_of_a_run_of_the_same_kind_or_not_known(straight, digits, tmp_path):
    words = training_runs.arguments(digits, straight.run_dir)
    (known,) = [line for line in report(parse(words), 2) if line.startswith("time")]
    rates = [
        r["train_images_per_second"] for r in read_journal(straight.run_dir / "metrics.jsonl") if "train_loss" in r
    ]
    rate = statistics.median(rates[1:])
    samples = Manifest.load(digits / "train").num_samples
    assert known.startswith(f"time        {epoch_time.duration(samples / rate)} an epoch, ")
    assert f"at {rate:,.0f} images/s: the median of {straight.run_dir}, on 2 ranks of its machine" in known
    for other in (["--model.T", "5"], ["--run_dir", str(tmp_path / "run")]):
        (unknown,) = [line for line in report(parse([*words, *other]), 2) if line.startswith("time")]
        assert unknown.startswith("time        not known: no run of digits beside ")
    assert (epoch_time.duration(89), epoch_time.duration(5400), epoch_time.duration(200000)) == (
        "89.0 s",
        "1.5 h",
        "2.3 days",
    )


def test_without_data_the_steps_are_not_known_and_the_rest_is(tmp_path):
    lines = report(parse(["--recipe", "imagenet_sew34_chi", "--data.path", str(tmp_path)]), 8)
    (steps,) = [line for line in lines if line.startswith("steps")]
    assert steps.startswith("steps       not known: ")
    assert any(line.startswith("parameters  21,7") and line.endswith("(1000 classes, assumed)") for line in lines)
    sizes = [float(line.split()[-2].replace(",", "")) for line in lines if line.endswith(" MiB")]
    assert sizes[-1] == pytest.approx(sum(sizes[:-1]), abs=1)


def test_ranks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ConfigError, match="does not divide over world_size=3"):
        report(parse(["--recipe", "digits"]), 3)
    with pytest.raises(ConfigError, match="--dry-run -1 is not allowed"):
        parse(["--recipe", "digits", "--dry-run", "-1"])


@pytest.mark.parametrize(
    ("stage", "precision", "optimizer", "expected"),
    [  # parameters, gradients, bucket, optimizer, copies: bytes a parameter on each of 4 ranks
        (0, "fp32", "sgd", [4, 4, 4, 4]),
        (0, "fp16", "sgd", [2, 2, 2, 8]),
        (1, "bf16", "sgd", [4, 5, 4, 2, 2]),
        (2, "fp32", "adamw", [4, 2, 4, 3]),
        (3, "fp32", "sgd", [1, 2, 4, 2]),
    ],
)
def test_memory_by_stage_precision_and_optimizer(stage, precision, optimizer, expected):
    config = dataclasses.replace(
        parse(["--recipe", "digits"]),
        train=TrainConfig(zero_stage=stage, precision=precision),
        optim=OptimConfig(name=optimizer),
    )
    with torch.device("meta"):
        network = build(config.model, num_classes=10, image_size=16)
    sizes = list(memory(config, network, 1000, 4).values())
    assert [size / 1000 for size in sizes[:-2]] == expected


@pytest.mark.parametrize(
    ("recipe", "options", "said"),
    [
        ("cifar10", "--train.epochs 1", "train.epochs=1 ends before optim.warmup_epochs=1: for a whole,"),
        ("cifar10", "--train.epochs 2", ""),
        ("digits", "--optim.schedule step --optim.milestones 10,30,60", "optim.milestones 30, 60: for"),
        ("digits", "--optim.schedule step --optim.milestones 10,29", ""),
        (
            "imagenet_sew34_fast",
            "--train.epochs 5",
            "train.epochs=5 ends before optim.warmup_epochs=5 and data.image_size_ramp=30,80: for",
        ),
    ],
)
def test_what_a_shortened_run_does_not_reach_is_said(recipe, options, said):
    config = parse(["--recipe", recipe, *options.split()])
    assert said in config.cut_off
    assert bool(said) == bool(config.cut_off)


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_recipe_is_cut_off_by_itself(recipe):
    assert not parse(["--recipe", recipe]).cut_off
