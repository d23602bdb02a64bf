"""Every recipe is a whole configuration, says what to expect of it, and names a network that can be built."""

import inspect
import math
import re

import pytest
import torch

from launch.devices import num_ranks
from launch.options import parse
from launch.recipes import RECIPES
from pipeline.config import ModelConfig, OptimConfig
from pipeline.engine.deepspeed_settings import deepspeed_settings
from pipeline.engine.schedule import Schedule
from pipeline.ranks import cores
from pipeline.snn.networks.build import build

GPUS = {"digits": 8, "digits_dvs": 2, "cifar10": 4, "cifar10_strong": 4, "tiny_imagenet": 4}
CLASSES = {
    "digits": 10,
    "digits_dvs": 10,
    "cifar10": 10,
    "cifar10_strong": 10,
    "imagenet100": 100,
    "tiny_imagenet": 200,
}
MILLIONS = {
    "digits": 0.02,
    "digits_dvs": 0.08,
    "cifar10": 0.27,
    "cifar10_strong": 0.85,
    "imagenet100": 11.2,
    "tiny_imagenet": 11.3,
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_resolves_and_its_network_builds(name):
    config = parse(["--recipe", name])
    assert config == RECIPES[name]()
    assert config.recipe == name
    assert config.run_dir == f"runs/{name}"
    gpus = GPUS.get(name, 8)
    settings = deepspeed_settings(config, gpus, 1)
    assert settings["train_batch_size"] == gpus * settings["train_micro_batch_size_per_gpu"]
    assert num_ranks(config.data, gpus) == gpus
    with torch.device("meta"):
        network = build(config.model, num_classes=CLASSES.get(name, 1000), image_size=config.data.image_size)
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    assert millions == pytest.approx(MILLIONS.get(name, 21.8), rel=0.05)


def test_whatever_is_steered_starts_from_calibrated_widths():
    for name, recipe in RECIPES.items():
        chi = recipe().chi
        assert chi.calibrates == (chi.policy == "chi"), name
    fixed = parse(["--recipe", "digits", "--chi.policy", "fixed"])
    assert not fixed.chi.calibrates
    assert not parse(["--recipe", "digits", "--chi.indicator", "participation"]).chi.calibrates


def test_the_digits_are_validated_a_few_times_on_the_way():
    config = parse(["--recipe", "digits"])
    due = [step for step in range(1, config.num_steps(1438)) if Schedule(config, 1438).evaluates(step)]
    assert 3 <= len(due) <= 5


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_its_command_and_what_to_expect(name):
    said = inspect.getdoc(RECIPES[name]) or ""
    assert f"launch/train.py --recipe {name}" in said
    assert ("%" in said.partition("About ")[2]) != ("ot run here" in said), "a result that was seen, or that none was"


def test_other_depths_and_lengths_are_an_override():
    for arch, millions in (("18", 11.7), ("50", 25.6), ("101", 44.5), ("152", 60.2)):
        config = parse(["--recipe", "imagenet_sew34_chi", "--model.arch", f"sew_resnet{arch}", "--train.epochs", "2"])
        with torch.device("meta"):
            network = build(config.model, num_classes=1000, image_size=224)
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
        assert config.train.epochs == 2


def test_the_imagenet_recipes_take_the_augmentation_that_their_text_names():
    words = re.findall(r"--data\.\S+ \S+?(?=[.,]?(?:\s|$))", inspect.getdoc(RECIPES["imagenet_sew34_fast"]) or "")
    assert len(words) == 3
    for name in ("imagenet_sew34_baseline", "imagenet_sew34_chi", "imagenet_sew34_fast"):
        data = parse(["--recipe", name, *(part for word in words for part in word.split())]).data
        assert (data.aa, data.mixup, data.cutmix) == ("rand-m7-mstd0.5-inc1", 0.1, 1.0)


def test_the_baseline_is_the_published_recipe():
    config = parse(["--recipe", "imagenet_sew34_baseline"])
    assert (config.data.global_batch, config.data.micro_batch, config.train.epochs) == (256, 32, 320)
    assert config.optim == OptimConfig(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.0, by_epoch=True)
    assert config.model == ModelConfig(
        arch="sew_resnet34",
        T=4,
        connect="add",
        neuron="if",
        v_th=1.0,
        reset="hard",
        detach_reset=True,
        zero_init_residual=False,
        surrogate="atan",
        scale="area",
        width=1 / math.pi,
    )
    assert (config.train.loss, config.train.label_smoothing, config.chi.policy) == ("ce", 0.0, "fixed")
    assert (config.data.eval_resize, config.data.image_size, config.data.flip) == (256, 224, True)
    assert (config.data.crop_area_min, config.data.crop_aspect) == (0.08, 4 / 3)
    samples = 1281167
    assert config.num_steps(samples) == math.ceil(320 * samples / 256)
    for epoch in (0, 1, 160, 319):
        step = math.ceil(epoch * samples / 256)
        wanted = 0.05 * (1 + math.cos(math.pi * epoch / 320))
        assert Schedule(config, samples).learning_rate(step + 1) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(
    ("cpuinfo", "has_bf16"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 sha_ni\n", True),
        ("flags\t\t: fpu avx2 amx_bf16\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),  # Arm
        ("model name\t: bf16\nflags\t\t: fpu avx2 avx512f\n", False),
        ("processor\t: 0\n", True),  # a system that does not tell
    ],
)
def test_recipes_for_a_cpu_too_use_bf16_where_it_is_no_slower(tmp_path, monkeypatch, cpuinfo, has_bf16):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(cores, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(cores, "NVIDIA", tmp_path / "nvidiactl")
    assert cores.cpu_has_bf16() == has_bf16
    assert parse(["--recipe", "digits"]).train.precision == ("bf16" if has_bf16 else "fp32")
    assert parse(["--recipe", "imagenet_sew34_fast"]).train.precision != "fp32"
    (tmp_path / "nvidiactl").touch()
    assert parse(["--recipe", "digits"]).train.precision == "bf16"
