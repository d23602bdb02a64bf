"""benchmarks/chi_soft_spikes.py: what a soft spike is, where and when there is one, and what it leaves alone."""

import dataclasses

import pytest
import torch

from benchmarks import chi_falsifiers_report as report
from benchmarks import chi_soft_spikes as soft
from benchmarks.chi_study_run import model_of, run
from pipeline.snn import neurons, surrogate
from pipeline.snn.kernels import reference
from pipeline.snn.losses import cross_entropy
from pipeline.snn.networks.build import build
from pipeline.snn.networks.sew_resnet import SEWResNet

SETTING = next(iter(soft.settings()))


def made(budget: float, seed: int = 0) -> SEWResNet:
    """A fresh network of 9 layers in fp64, the same for every budget."""
    torch.manual_seed(0)
    network = build(model_of(SETTING), num_classes=10, image_size=16)
    assert isinstance(network, SEWResNet)
    soft.soften(network, budget, seed)
    neurons.bind(network)
    return network.double()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randn(6, 3, 16, 16, dtype=torch.float64), torch.randint(0, 10, (6,))


@pytest.mark.parametrize("width", [0.3, 1.0, 2.5])
def test_a_soft_spike_is_the_integral_of_the_surrogate(width):
    u = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
    w, one = torch.tensor(width, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    summed = torch.cumulative_trapezoid(surrogate.derivative(u, w, one, shape="triangle", scale="area"), u)
    torch.testing.assert_close(soft.integral(u, w)[1:], summed, rtol=0, atol=1e-6)
    outside = ~surrogate.covered(u, w)
    assert torch.equal(soft.integral(u, w)[outside], (u[outside] >= 0).double())


def one_layer(budget: float, seed: int = 0, T: int = 3):
    """Output and gradient of one layer of a network in training, with its hard spikes and u, (T N, C, H, W)."""
    network = made(0.0)
    plain = network.get_submodule("layer1.0.sn1")
    assert isinstance(plain, neurons.Neuron)
    layer = soft.SoftNeuron(plain, budget, seed, 3)
    torch.manual_seed(2)
    y, shortcut = torch.randn(2, T * 4, 16, 8, 8, dtype=torch.float64)
    norm = torch.nn.BatchNorm2d(16).double()
    seen: list = []
    plain.probe = seen.append
    answers = []
    for neuron in (plain, layer):
        leaf = y.clone().requires_grad_()
        out = neuron.after_norm(leaf, norm, T, shortcut=shortcut)
        (gradient,) = torch.autograd.grad((out * y).sum(), leaf)
        answers.append((out - shortcut, gradient))
    return answers, torch.cat(seen), layer


def test_a_share_of_the_neurons_is_soft_at_all_time_steps_and_gradients_stay():
    ((hard, gradient), (out, softened)), u, _ = one_layer(0.2)
    assert torch.equal(gradient, softened)
    smooth = soft.integral(u, torch.tensor(1.0))
    is_soft = (out - smooth).abs() < 1e-9
    assert torch.all(is_soft | ((out - hard).abs() < 1e-9))
    inside = surrogate.covered(u, torch.tensor(1.0))
    changed = is_soft & inside
    assert changed.double().mean().item() == pytest.approx(0.2, abs=0.02)
    by_neuron = [changed.unflatten(0, (3, -1))[t] for t in range(3)]
    both = inside.unflatten(0, (3, -1))
    assert torch.equal(by_neuron[0] & both[1], by_neuron[1] & both[0])  # chosen at one step, chosen at the other


def test_the_choice_is_a_function_of_the_seed():
    outs = [one_layer(0.2, seed)[0][1][0] for seed in (0, 0, 1)]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    *_, layer = one_layer(0.2)
    y, norm = torch.randn(12, 16, 8, 8), torch.nn.BatchNorm2d(16)
    assert not torch.equal(layer.after_norm(y, norm, 3), layer.after_norm(y, norm, 3))  # another one in each pass


def test_without_a_budget_and_in_evaluation_every_bit_is_that_of_hard_spikes(batch):
    ((hard, gradient), (out, other)), *_ = one_layer(0.0)
    assert torch.equal(hard, out)
    assert torch.equal(gradient, other)
    plain, softened = made(0.0), made(0.2)
    assert not any(isinstance(layer.neuron, soft.SoftNeuron) for layer in plain.spiking_layers())
    assert all(isinstance(layer.neuron, soft.SoftNeuron) for layer in softened.spiking_layers())
    with torch.no_grad():
        assert not torch.equal(plain(batch[0]), softened(batch[0]))
        softened.load_state_dict(plain.state_dict())
        assert torch.equal(plain.eval()(batch[0]), softened.eval()(batch[0]))


class ByDefinition(torch.nn.Module):
    """Neurons that emit the soft spike everywhere, by autograd and without any packing: its gradient is exact."""

    def __init__(self, rule: reference.Rule) -> None:
        super().__init__()
        self.rule = rule

    def after_norm(self, y, bn, num_steps, *, static=False, shortcut=None, again=None):
        current = bn(y)
        steps = [current] * num_steps if static else current.unflatten(0, (num_steps, -1)).unbind()
        emitted, v = [], torch.zeros_like(steps[0])
        for x in steps:
            u = v + x - self.rule.v_th
            emitted.append(soft.integral(u, torch.ones((), dtype=u.dtype)))
            v = (v + x) * (u < 0)
        return torch.cat(emitted) if shortcut is None else torch.cat(emitted) + shortcut


def test_weights_get_the_gradient_of_what_was_emitted(batch):
    """The networks keep spikes in few bits for the backward pass, which soft ones do not fit in."""
    softened, twin = made(1e9), made(0.0)  # a share of 1
    for layer in twin.spiking_layers():
        assert isinstance(layer.neuron, neurons.Neuron)
        twin.set_submodule(layer.name, ByDefinition(layer.neuron.rule))
    for module in twin.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(),))
    losses = [cross_entropy(network(batch[0]), batch[1]) for network in (softened, twin)]
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)
    weights = [[m.weight for m in network.modules() if isinstance(m, torch.nn.Conv2d)] for network in (softened, twin)]
    gradients = [torch.autograd.grad(loss, w) for loss, w in zip(losses, weights, strict=True)]
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


def test_hard_statistics_are_those_of_hard_passes(batch):
    images = torch.cat([batch[0]] * 3).bfloat16()
    softened = made(0.2).float()
    before = {name: value.clone() for name, value in softened.state_dict().items()}
    found = soft.with_hard_statistics(softened, images[:14], "fp32", 6)  # two whole batches, the same images
    for name, value in softened.state_dict().items():
        assert torch.equal(value, before[name]), name
    plain = made(0.0).float()
    plain.load_state_dict(before)
    norm = plain.get_submodule("layer3.0.bn2")
    assert isinstance(norm, torch.nn.BatchNorm2d)
    norm.momentum = 1.0
    with torch.no_grad():
        plain(images[:6].float())
    mean = found.get_submodule("layer3.0.bn2").running_mean
    torch.testing.assert_close(mean, norm.running_mean, rtol=1e-4, atol=1e-5)


@pytest.fixture
def scratch(tmp_path):
    """Made-up images in the place of the digits."""
    torch.manual_seed(4)
    (tmp_path / "digits").mkdir()
    images = torch.randn(1_200, 3, 16, 16).bfloat16(), torch.randint(0, 10, (1_200,))
    torch.save(images, tmp_path / "digits/train-16.pt")
    return tmp_path


def test_a_run_has_both_accuracies_and_a_budget_of_zero_is_the_plain_run(scratch):
    records = {}
    for budget in (0.0, 0.2):
        setting = dataclasses.replace(SETTING, data="digits", num_images=128, epochs=4, budget=budget)
        records[budget] = soft.run_one(setting, scratch)
    plain = run(dataclasses.replace(SETTING, data="digits", num_images=128, epochs=4), scratch)
    assert {name: records[0.0][name] for name in ("accuracy", "train_loss")} == {
        name: plain[name] for name in ("accuracy", "train_loss")
    }
    assert records[0.2]["train_loss"] != plain["train_loss"]
    for record in records.values():
        assert {"train_accuracy", "hard_accuracy", "hard_train_accuracy"} <= set(record)


def test_gains_are_paired_by_seed(capsys):
    def record(budget, seed, accuracy, train, hard):
        fields = {"accuracy": accuracy, "train_accuracy": train, "hard_accuracy": hard, "hard_train_accuracy": train}
        return {"arm": "soft", "budget": budget, "seed": seed, **fields}

    records = [record(0.0, seed, 0.40 + 0.1 * seed, 0.50 + 0.1 * seed, 0.4) for seed in range(2)]
    records += [record(0.05, seed, 0.41 + 0.1 * seed, 0.50 + 0.1 * seed, 0.4) for seed in range(2)]
    records += [record(0.2, seed, 0.37 + 0.1 * seed + 0.02 * seed, 0.50 + 0.1 * seed, 0.4) for seed in range(2)]
    gains = report.soft_gains([*records, record(0.05, 2, 0.9, 0.9, 0.9)], "as training left them")
    assert list(gains) == ["budget 0.05", "budget 0.2", "mean of both"]
    held_out = {name: gain.tolist() for name, (gain, _) in gains.items()}
    assert held_out["budget 0.05"] == pytest.approx([1, 1])
    assert held_out["budget 0.2"] == pytest.approx([-3, -1])
    assert held_out["mean of both"] == pytest.approx([-1, 0])
    assert gains["budget 0.2"][1] == pytest.approx([3, 1])  # the gap: training stays, held out falls
    assert report.one_sided(gains["budget 0.2"][0]) == pytest.approx(-2 - 6.3138, abs=1e-3)
    few = report.soft_gains([r for r in records if r["budget"] != 0.05 or r["seed"] == 1], "as training left them")
    assert {name: len(gain) for name, (gain, _) in few.items()} == {
        "budget 0.05": 1,
        "budget 0.2": 2,
        "mean of both": 1,
    }
    hard = report.soft_gains(records, "of hard passes")
    assert [gain.tolist() for gain, _ in hard.values()] == [[0, 0]] * 3
    report.show(records)
    shown = capsys.readouterr().out
    assert "budget 0.2    against 0, 2 pairs: held out -2.00 ± 12.71, one-sided 95 % bound -8.31; gap +2.00" in shown


def test_on_new_seeds_soft_spikes_meet_hard_ones_of_both_lengths(capsys):
    def record(budget, epochs, seed, accuracy):
        fields = {"accuracy": accuracy, "hard_accuracy": 0.5, "train_accuracy": 0.5, "hard_train_accuracy": 0.5}
        return {"arm": "again", "budget": budget, "epochs": epochs, "seed": seed, **fields}

    records = [record(0.0, 12, seed, 0.40) for seed in (6, 7, 8)]
    records += [record(0.2, 12, seed, 0.41 + 0.01 * (seed - 6)) for seed in (6, 7)]
    records += [record(0.0, 18, seed, 0.43) for seed in (6, 7)]
    gains = report.gains_again(records, "as training left them")
    assert {name: values.tolist() for name, values in gains.items()} == {
        "hard spikes": pytest.approx([1, 2]),
        "hard spikes, longer": pytest.approx([-2, -1]),
    }
    assert report.gains_again(records[:3], "as training left them") == {}
    report.show(records)
    shown = capsys.readouterr().out
    assert "as training left them, against hard spikes, longer, 2 pairs: held out -1.50" in shown
    assert "soft spikes, statistics" not in shown


def test_the_second_trial_has_its_own_seeds():
    settings = list(soft.settings_again())
    assert {setting.seed for setting in settings}.isdisjoint(setting.seed for setting in soft.settings())
    arms = {(setting.budget, setting.epochs) for setting in settings}
    assert arms == {(0.0, 12), (0.2, 12), (0.0, 18)}
    assert len(settings) == len(arms) * len(soft.AGAIN_SEEDS)
