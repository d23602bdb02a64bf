"""`chi.attach` in a plain script: exact indicators, two DDP ranks that steer alike, neurons of another library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline import chi
from pipeline.chi import widths
from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.snn import losses
from pipeline.snn.external_neurons import Surrogate
from pipeline.snn.membrane_probe import by_time_step
from pipeline.snn.networks import sew_resnet
from pipeline.snn.neurons import bind
from tests.chi import attach_nets

ROOT = Path(__file__).parents[2]


def network(**settings) -> nn.Module:
    torch.manual_seed(0)
    return sew_resnet.build(ModelConfig(arch="sew_tiny", T=2, **settings), num_classes=10, image_size=8)


def step(model: nn.Module, optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.rand(4, 3, 8, 8, generator=generator), torch.randint(10, (4,), generator=generator)
    losses.cross_entropy(model(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_the_indicators_are_those_of_the_gradient_that_the_optimizer_used():
    model = network()
    optimizer = sgd(model)
    used = {}
    pilot = chi.attach(model, optimizer, steps=10)
    with torch.no_grad():
        model.get_parameter("layer1.0.bn1.weight")[:] = 0  # a dead layer: no gradient through it
        model.get_parameter("layer1.0.bn1.bias")[:] = -5
    optimizer.register_step_pre_hook(
        lambda *_: used.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    )
    step(model, optimizer, 0)
    assert pilot.indicators is not None
    for layer, measured in zip(pilot.layers, pilot.indicators.chi.tolist(), strict=True):
        gradient = used[layer.parameters[0]]
        assert measured == (gradient != 0).sum().item() / gradient.numel()
    assert 0 < pilot.indicators.network_chi.item() < 1
    assert pilot.indicators.chi.min().item() == 0
    rate = pilot.indicators.firing_rate
    assert (rate >= 0).all()
    assert (rate <= 1).all()


def test_an_evaluation_between_two_steps_is_not_counted():
    rates = []
    for evaluates in (False, True):
        model = network()
        optimizer = sgd(model)
        pilot = chi.attach(model, optimizer, steps=10)
        if evaluates:
            model.eval()
            model(torch.rand(16, 3, 8, 8))
            model.train()
        step(model, optimizer, 0)
        assert pilot.indicators is not None
        rates.append(pilot.indicators.firing_rate)
    assert torch.equal(*rates)


@pytest.mark.parametrize("policy", ["chi", "ds_atgo"])
def test_it_steers_and_resumes_bit_for_bit(policy):
    def begin():
        model = network()
        optimizer = sgd(model)
        return model, optimizer, chi.attach(model, optimizer, steps=8, interval=2, policy=policy)

    model, optimizer, pilot = begin()
    for seed in range(8):
        step(model, optimizer, seed)
    other, other_optimizer, other_pilot = begin()
    for seed in range(3):
        step(other, other_optimizer, seed)
    resumed, resumed_optimizer, resumed_pilot = begin()
    resumed.load_state_dict(other.state_dict())
    resumed_pilot.load_state_dict(other_pilot.state_dict())
    for seed in range(3, 8):
        step(resumed, resumed_optimizer, seed)
    assert torch.equal(resumed_pilot.neurons.widths, pilot.neurons.widths)
    assert pilot.neurons.widths.unique().numel() > 1


@pytest.mark.parametrize("kind", attach_nets.KINDS)
def test_calibration_of_every_kind_of_neurons_leaves_their_buffers_as_they_were(kind):
    """snnTorch's keep their potential in a buffer, which has another shape after the first pass."""
    torch.manual_seed(0)
    model = attach_nets.Net(kind)
    pilot = chi.attach(model, sgd(model), target=0.3, target_end=0.3)
    before = [(name, buffer.shape) for name, buffer in model.named_buffers()]
    pilot.calibrate(torch.randn(16, 32))
    assert [(name, buffer.shape) for name, buffer in model.named_buffers()] == before
    assert pilot.neurons.widths.unique().numel() == 2


def test_calibration_puts_the_first_coverage_at_the_target_and_leaves_the_network_as_it_was():
    model = network()
    optimizer = sgd(model)
    pilot = chi.attach(model, optimizer, target=0.3, target_end=0.3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(5)
    images, labels = torch.rand(4, 3, 8, 8, generator=generator), torch.randint(10, (4,), generator=generator)
    pilot.calibrate(images)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    losses.cross_entropy(model(images), labels).backward()
    optimizer.step()
    assert pilot.indicators is not None
    assert pilot.indicators.coverage.tolist() == pytest.approx([0.3] * 6, abs=0.01)


def test_a_calibration_keeps_few_potentials_of_a_large_layer(monkeypatch):
    monkeypatch.setattr(widths, "CALIBRATION_SAMPLES", 10)
    for count in (1, 10, 11, 95, 1001):
        kept = widths.thinned(torch.arange(count).view(1, count)).tolist()
        assert 5 <= len(kept) <= 10 or kept == list(range(count))
        assert kept[0] == 0
        assert count - 1 - kept[-1] < -(-count // 10), "to the end"


@pytest.mark.parametrize("target", [0.05, 0.3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize(
    "distances",
    [
        torch.linspace(0, 3, 1001),
        torch.cat([torch.full((600,), 1.0), torch.linspace(0, 3, 401)]),  # silent inputs: |h - v_th| = v_th
        torch.full((50,), 1.0),
        torch.ones(1),
    ],
)
def test_a_calibrated_width_is_where_the_coverage_is_nearest_to_its_target(distances, target):
    """Of all widths; those of the tests' own choice lie beside each distance."""
    places = torch.cat([distances * factor for factor in (0.9999, 1.0, 1.0011)])
    best = min(abs(float((distances < w).double().mean()) - target) for w in places)
    chosen = widths.width_at(distances, target, 0.0).double().log().exp().float()  # as the controller keeps it
    assert abs(float((distances < chosen).double().mean()) - target) <= best + widths.TIED
    kept = widths.width_at(distances, target, 0.01).double().log().exp().float()
    assert float((distances < kept).double().mean()) > 0.01, "some gradient, though it be of all neurons alike"


class Reached(nn.Module):
    """Two layers of neurons, frozen batch statistics, a buffer that each pass replaces, as snnTorch's membrane is."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.first, self.second = Surrogate(width=0.7), Surrogate(width=0.6)
        self.register_buffer("mem", torch.zeros(0))
        self.skips = self.breaks = False
        self.seen: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(self.norm.training)
        spikes = self.first(self.norm(self.one(x)) - 0.5)
        self.mem = spikes.detach()
        logits = self.two(spikes)
        if self.breaks:
            logits = logits * torch.nan
        return logits if self.skips else logits + self.second(logits - 0.2)


def test_a_calibration_puts_back_modes_and_buffers_whatever_a_pass_made_of_them():
    torch.manual_seed(0)
    model = Reached()
    model.norm.eval()
    pilot = chi.attach(model, sgd(model), target=0.3, target_end=0.3)
    mem, statistics = model.mem, {name: value.clone() for name, value in model.norm.state_dict().items()}
    pilot.calibrate(torch.randn(64, 6))
    assert model.seen == [False], "what is frozen stays frozen"
    assert [module.training for module in model.modules()] == [module is not model.norm for module in model.modules()]
    assert model.mem is mem
    assert mem.shape == (0,)
    assert all(torch.equal(value, statistics[name]) for name, value in model.norm.state_dict().items())
    model.eval()
    with widths.in_training_mode(model):
        assert model.norm.training
    assert not model.one.training


@pytest.mark.parametrize("why", ["skips", "breaks"])
def test_a_layer_that_the_batch_does_not_reach_or_not_with_numbers_keeps_its_width(why):
    torch.manual_seed(0)
    model = Reached()
    setattr(model, why, True)
    pilot = chi.attach(model, sgd(model), target=0.3, target_end=0.3)
    coverage = pilot.widths.calibrate(model, torch.randn(64, 6))
    assert coverage.isnan().tolist() == [False, True]
    assert coverage[0] == pytest.approx(0.3, abs=0.01)
    assert pilot.neurons.widths[1].item() == pytest.approx(0.6)


def test_a_schedule_begins_at_the_model_s_own_width():
    model = network(width=2.0)
    optimizer = sgd(model)
    pilot = chi.attach(model, optimizer, steps=4, policy="schedule", width_end=0.5, interval=1)
    widths = []
    for seed in range(4):
        step(model, optimizer, seed)
        widths.append(pilot.neurons.widths[0].item())
    assert widths == pytest.approx([2**0.5, 1.0, 0.5**0.5, 0.5])


@pytest.mark.parametrize(("policy", "expected"), [("mpd_agl", 2**0.5), ("ds_atgo", None)])
def test_the_rivals_steer_too(policy, expected):
    model = network(surrogate="rectangle")
    optimizer = sgd(model)
    pilot = chi.attach(model, optimizer, policy=policy, interval=1)
    step(model, optimizer, 0)
    widths = pilot.neurons.widths
    if expected is not None:
        assert widths.tolist() == pytest.approx([expected] * 6, rel=1e-3)  # γ is still near 1
    else:
        assert widths.unique().numel() == 6


def test_ds_atgo_sees_the_potential():
    model = network(neuron="if", surrogate="rectangle")
    seen: list[torch.Tensor] = []
    pilot = chi.attach(model, sgd(model), policy="ds_atgo", interval=1)
    first = pilot.layers[0]
    kept = first.neuron.probe
    assert kept is not None
    first.neuron.probe = lambda u: (kept(u), seen.append(u.clone()))  # pyright: ignore
    images = torch.rand(4, 3, 8, 8)
    model(images)
    x = torch.nn.functional.batch_norm(
        model.get_submodule("conv1")(images), None, None, torch.ones(16), torch.zeros(16), training=True
    )
    v = torch.zeros_like(x)
    for u in seen:
        h = v + x
        assert torch.allclose(u, h - 1, atol=1e-5)
        v = torch.where(h >= 1, 0, h)
    assert len(seen) == 2


def test_accumulated_micro_batches_count_as_one_step():
    model = network()
    optimizer = sgd(model)
    pilot = chi.attach(model, optimizer, steps=10)
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        losses.cross_entropy(model(torch.rand(4, 3, 8, 8, generator=generator)), torch.tensor([1, 2, 3, 4])).backward()
    assert pilot.step == 0
    optimizer.step()
    assert pilot.step == 1
    assert pilot.indicators is not None
    assert (pilot.indicators.coverage < 1).all()


class Foreign(nn.Module):
    """How SpikingJelly's neurons use a surrogate: one call per time step, on v - v_threshold."""

    def __init__(self, surrogate_function: nn.Module) -> None:
        super().__init__()
        self.surrogate_function = surrogate_function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v, spikes = torch.zeros_like(x[0]), []
        for x_t in x:
            h = v + x_t
            spikes.append(self.surrogate_function(h - 1))
            v = h * (1 - spikes[-1].detach())
        return torch.stack(spikes)


def test_a_neuron_of_another_library_gets_our_gradient_and_counts():
    weight = nn.Linear(5, 7)
    foreign = nn.Sequential(weight, Foreign(chi.Surrogate("triangle", width=0.8)))
    optimizer = sgd(foreign)
    pilot = chi.attach(foreign, optimizer, target=0.4, target_end=0.4, interval=1)
    assert [layer.parameters for layer in pilot.layers] == [("0.weight",)]
    x = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))
    current = weight(x).detach().requires_grad_()
    ours = sew_resnet.neurons.from_config(ModelConfig(width=0.8))
    counted = bind(nn.Sequential(ours))
    ours(current).square().sum().backward()
    theirs = weight(x)
    theirs.retain_grad()
    foreign[1](theirs).square().sum().backward()
    assert theirs.grad is not None
    assert current.grad is not None
    assert torch.equal(theirs.grad, current.grad)
    optimizer.step()
    assert pilot.indicators is not None
    neuron_steps = 3 * 6 * 7
    assert pilot.indicators.coverage.item() * neuron_steps == pytest.approx(counted.covered.item())
    assert pilot.indicators.firing_rate.item() * neuron_steps == pytest.approx(counted.spikes.item())
    assert pilot.neurons.widths.item() != pytest.approx(0.8)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target": 0.5, "target_end": 0.3}, r"steps is missing.*give the optimizer steps"),
        ({"policy": "schedule"}, "steps is missing"),
        ({"steps": 3, "policy": "chy"}, r"chi.policy='chy' is not allowed; use one of fixed"),
        ({"steps": 3, "etta": 1.0}, r"etta is no setting; use some of policy, indicator, target"),
    ],
)
def test_a_wrong_setting_is_refused(settings, said):
    model = network()
    with pytest.raises(ConfigError, match=said):
        chi.attach(model, sgd(model), **settings)


def test_what_cannot_be_steered_is_refused():
    with pytest.raises(ConfigError, match=r"coverage is undefined for the surrogate 'atan'.*triangle or rectangle"):
        chi.attach(network(surrogate="atan"), sgd(nn.Linear(1, 1)), steps=3)
    model = network()
    with pytest.raises(ConfigError, match="use it with policy chi, indicator coverage"):
        chi.attach(model, sgd(model), policy="fixed").calibrate(torch.rand(4, 3, 8, 8))
    with pytest.raises(ValueError, match="no spiking layer"):
        chi.attach(plain := nn.Linear(1, 1), sgd(plain), steps=3)


def test_two_ranks_of_ddp_read_the_same_and_steer_alike():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "tests/chi/chi_ddp.py"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "both ranks agree" in done.stdout


def test_coverage_and_rate_of_every_time_step_average_to_those_of_the_step():
    model = network()
    optimizer = sgd(model)
    pilot = chi.attach(model, optimizer, policy="fixed")
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(4, 3, 8, 8, generator=generator), torch.randint(10, (4,), generator=generator)
    coverage, rate = by_time_step(model, images, pilot.neurons)
    pilot.neurons.zero_counts()
    losses.cross_entropy(model(images), labels).backward()
    optimizer.step()
    assert pilot.indicators is not None
    assert coverage.shape == rate.shape == (6, 2)
    assert coverage.mean(1).tolist() == pytest.approx(pilot.indicators.coverage.tolist(), abs=1e-6)
    assert rate.mean(1).tolist() == pytest.approx(pilot.indicators.firing_rate.tolist(), abs=1e-6)
    assert not torch.equal(coverage[:, 0], coverage[:, 1])
