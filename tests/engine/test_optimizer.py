"""The learning rate by position, what decays, and the optimizer's own arithmetic."""

import math

import pytest
import torch
from torch import nn

from launch.options import parse
from pipeline.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from pipeline.engine.optimizer import optimizer_of, parameter_groups
from pipeline.engine.schedule import Schedule
from pipeline.errors import ConfigError
from pipeline.snn.networks import own, own_source, sew_resnet
from tests.conftest import ROOT

SAMPLES, STEPS_AN_EPOCH = 1280, 10


def rates(epochs: float, samples: int = SAMPLES, **optim) -> list[float]:
    config = Config(
        recipe="rates",
        data=DataConfig(global_batch=128),
        optim=OptimConfig(lr=0.8, **optim),
        train=TrainConfig(epochs=epochs),
    )
    schedule = Schedule(config, samples)
    return [schedule.learning_rate(step) for step in range(1, schedule.num_steps + 1)]


def test_cosine_falls_from_the_peak_to_nothing():
    seen = rates(4)
    assert seen == pytest.approx([0.4 * (1 + math.cos(math.pi * step / 40)) for step in range(40)])
    assert seen[0] == 0.8
    assert 0 < seen[-1] < 0.002


def test_cosine_by_epoch_is_torchs_own_stepped_at_each_epoch():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.8)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    wanted = []
    for _ in range(4):
        wanted += [optimizer.param_groups[0]["lr"]] * STEPS_AN_EPOCH
        optimizer.step()
        schedule.step()
    assert rates(4, by_epoch=True) == pytest.approx(wanted)


def test_milestones_are_torchs_own():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.8)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1, 3], gamma=0.2)
    wanted = []
    for _ in range(5):
        wanted += [optimizer.param_groups[0]["lr"]] * STEPS_AN_EPOCH
        optimizer.step()
        schedule.step()
    assert rates(5, schedule="step", milestones=(1.0, 3.0), gamma=0.2) == pytest.approx(wanted)


def test_a_milestone_acts_at_the_first_step_that_lies_behind_it():
    # 100 samples in batches of 128: step s begins at epoch 1.28 s.
    assert rates(4, samples=100, schedule="step", milestones=(1.28,)) == pytest.approx([0.8, 0.08, 0.08, 0.08])
    assert rates(4, samples=100, schedule="step", milestones=(1.3,)) == pytest.approx([0.8, 0.8, 0.08, 0.08])
    # By epoch, the step that begins within epoch 1 still has the rate 1.
    assert rates(4, samples=100, schedule="step", milestones=(1.28,), by_epoch=True)[1] == pytest.approx(0.8)


@pytest.mark.parametrize("milestone", [9, 50, 82, 100, 200])
@pytest.mark.parametrize("global_batch", [100, 120, 224, 448])
def test_by_epoch_a_milestone_acts_from_the_first_step_that_begins_in_its_epoch(global_batch, milestone):
    for samples in (1_437, 50_000, 1_281_167):
        config = Config(
            recipe="rates",
            data=DataConfig(global_batch=global_batch, micro_batch=4),
            optim=OptimConfig(lr=1.0, schedule="step", milestones=(float(milestone),), by_epoch=True),
            train=TrainConfig(epochs=300),
        )
        schedule = Schedule(config, samples)
        first = -(-milestone * samples // global_batch) + 1
        assert [schedule.learning_rate(step) for step in (first - 1, first)] == pytest.approx([1.0, 0.1])


@pytest.mark.parametrize("optim", [{}, {"schedule": "constant"}, {"schedule": "step", "milestones": (3.0,)}])
def test_warm_up_rises_evenly_to_the_peak_whatever_follows(optim):
    seen = rates(4, warmup_epochs=1, **optim)
    assert seen[:11] == pytest.approx([0.8 * min(step + 1, 11) / 11 for step in range(11)])
    assert seen[-1] == pytest.approx({"constant": 0.8, "step": 0.08}.get(optim.get("schedule"), 0.0), abs=0.003)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adam"}, "optim.name='adam' is not allowed; use one of sgd, adamw"),
        ({"schedule": "poly"}, "optim.schedule='poly' is not allowed; use one of cosine, step, constant"),
        ({"beta2": 1.0}, r"optim.beta2=1.0 is not allowed; use a number in \[0, 1\)"),
        ({"eps": 0.0}, "optim.eps=0.0 is not allowed; use a number above 0"),
        ({"nesterov": True, "momentum": 0.0}, "use it with optim.name sgd and an optim.momentum above 0"),
        ({"nesterov": True, "name": "adamw"}, "use it with optim.name sgd"),
        (
            {"schedule": "step"},
            r"optim.milestones=\(\) is not allowed; use at least one epoch with optim.schedule step",
        ),
        ({"milestones": (30.0,)}, "and none with another"),
        ({"schedule": "step", "milestones": (30.0, 30.0)}, "use epochs above 0 that rise, as in 30,60,90"),
        ({"schedule": "step", "milestones": (0.0, 30.0)}, "use epochs above 0 that rise"),
        ({"schedule": "step", "milestones": (float("nan"),)}, "use epochs above 0 that rise"),
        ({"gamma": 0.0}, r"optim.gamma=0.0 is not allowed; use a number in \(0, 1\]"),
        ({"weight_decay": -1.0}, "optim.weight_decay=-1.0 is not allowed; use a number of at least 0"),
    ],
)
def test_impossible_options_are_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "mse"}, "train.loss='mse' is not allowed; use one of ce, tet"),
        ({"label_smoothing": 1.0}, r"train.label_smoothing=1.0 is not allowed; use a number in \[0, 1\)"),
        ({"tet_lambda": 1.5}, r"train.tet_lambda=1.5 is not allowed; use a number in \[0, 1\]"),
    ],
)
def test_impossible_losses_are_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**fields)


def plif_network() -> sew_resnet.SEWResNet:
    return sew_resnet.build(ModelConfig(neuron="plif"), num_classes=10, image_size=16)


def test_filters_and_matrices_decay_and_nothing_else():
    network = plif_network()
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decaying, others = parameter_groups(OptimConfig(weight_decay=0.01), network)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.01, 0.0)
    kept = {names[id(p)] for p in others["params"]}
    assert {names[id(p)] for p in decaying["params"]} | kept == set(names.values())
    assert kept == {name for name in names.values() if name.rpartition(".")[2] in ("bias", "w") or "bn" in name
                    or "downsample.1" in name}  # fmt: skip
    assert {"sn1.w", "bn1.weight", "fc.bias"} <= kept


def test_what_neurons_learn_over_time_does_not_decay():
    source = own_source.find(f"{ROOT}/docs/network_psn.py:network")
    network = own.build(source, ModelConfig(), num_classes=10, in_channels=3, image_sizes=(16,), micro_batch=2)  # pyright: ignore
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decaying, others = parameter_groups(OptimConfig(weight_decay=0.01), network)
    assert {names[id(p)].rpartition(".")[2] for p in decaying["params"]} == {"weight"}
    assert all(not names[id(p)].endswith("neurons.weight") for p in decaying["params"])
    assert sum(names[id(p)].endswith("neurons.weight") for p in others["params"]) == len(network.spiking_layers())


def test_one_group_where_all_decay_or_nothing_does():
    network = plif_network()
    for optim in (OptimConfig(), OptimConfig(weight_decay=0.01, decay_norm_and_neurons=True)):
        (group,) = parameter_groups(optim, network)
        assert group["weight_decay"] == optim.weight_decay
        assert len(group["params"]) == len(list(network.parameters()))


def one_step(**optim) -> tuple[nn.Linear, nn.Linear]:
    """A layer after two updates from the same gradient, and the layer before them."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    before = nn.Linear(3, 2)
    before.load_state_dict(layer.state_dict())
    optimizer = optimizer_of(OptimConfig(lr=0.1, **optim), layer)
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    for _ in range(2):
        optimizer.step()
    return layer, before


def test_nesterov_is_its_formula():
    layer, before = one_step(momentum=0.9, nesterov=True)
    # v1 = g, v2 = 1.9 g; the updates are g + 0.9 v.
    assert torch.allclose(before.weight - layer.weight, torch.tensor(0.1 * 0.5 * (1.9 + 1 + 0.9 * 1.9)))


def test_adamw_is_its_formula_and_decays_the_matrix_alone():
    layer, before = one_step(name="adamw", beta1=0.8, beta2=0.9, eps=0.25, weight_decay=0.2)
    move = 0.1 * 0.5 / (0.5 + 0.25)  # a constant gradient: both means, corrected for their start, are exact
    assert torch.allclose(layer.bias, before.bias - 2 * move)
    once = before.weight * (1 - 0.1 * 0.2) - move
    assert torch.allclose(layer.weight, once * (1 - 0.1 * 0.2) - move)


def test_options_reach_the_command_line():
    words = ["--optim.schedule", "step", "--optim.milestones", "3,6.5", "--optim.name", "adamw"]
    optim = parse(["--recipe", "digits", *words]).optim
    assert (optim.schedule, optim.milestones, optim.name) == ("step", (3.0, 6.5), "adamw")
    with pytest.raises(ConfigError, match=r"argument --optim\.milestones: invalid list of numbers value: '3;6'"):
        parse(["--recipe", "digits", "--optim.milestones", "3;6"])
