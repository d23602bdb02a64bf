"""Which weights `chi.attach` takes for those that feed a layer, in networks that do not list their layers."""

import copy

import pytest
import torch
from torch import Tensor, nn

from pipeline import chi
from pipeline.config import ModelConfig
from pipeline.snn.kernels.reference import Rule
from pipeline.snn.networks import sew_resnet
from pipeline.snn.networks.feeding import fed_layers
from pipeline.snn.networks.network import Network
from pipeline.snn.neurons import Neuron, bind
from tests.support import peers


def neurons() -> Neuron:
    return Neuron(Rule(shape="triangle"), width=2.0)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def a_pass(model: nn.Module) -> None:
    model(torch.randn(2, 7, 5)).square().sum().backward()


def one_step(model: nn.Module) -> chi.Pilot:
    optimizer = sgd(model)
    pilot = chi.attach(model, optimizer, steps=3)
    a_pass(model)
    optimizer.step()
    return pilot


def chi_of(model: nn.Module, *names: str) -> float:
    gradient = torch.cat([model.get_parameter(name).grad.flatten() for name in names])  # pyright: ignore
    return float((gradient != 0).double().mean())


def test_the_nearest_weight_before_a_neuron_feeds_it(monkeypatch):
    torch.manual_seed(0)
    model = sew_resnet.build(ModelConfig(arch="sew_tiny", T=2), num_classes=10, image_size=8)
    state = bind(model)
    expected = fed_layers(model, state)
    monkeypatch.delattr(sew_resnet.SEWResNet, "spiking_layers")
    monkeypatch.delattr(Network, "spiking_layers")
    found = {id(layer.neuron): layer for layer in fed_layers(model, state)}
    for layer in expected:
        same = found[id(layer.neuron)]
        assert (same.parameters, same.norm) == (layer.parameters, layer.norm)


class Product(nn.Module):
    """Two layers whose spikes, multiplied, feed a third, as in attention; the third is registered last."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(5, 6), nn.Linear(5, 6)
        self.of_q, self.of_k, self.of_both = (neurons() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.of_both(3 * self.of_q(self.q(x)) * self.of_k(self.k(x))).mean(0)


def test_neurons_fed_by_products_of_spikes_have_no_weight_and_no_chi():
    torch.manual_seed(0)
    pilot = one_step(Product())
    assert [(layer.parameters, layer.known) for layer in pilot.layers] == [
        (("q.weight",), True), (("k.weight",), True), ((), True)]  # fmt: skip
    assert pilot.indicators is not None
    assert pilot.indicators.chi.isnan().tolist() == [False, False, True]


def test_of_a_compiled_part_no_weight_is_taken_as_known():
    torch.manual_seed(0)
    model = Product()
    model.q = nn.Sequential(nn.Linear(5, 5), torch.compile(nn.Linear(5, 6), backend="aot_eager"))  # pyright: ignore
    layers = {layer.name: layer for layer in one_step(model).layers}
    assert not layers["of_q"].known
    assert layers["of_k"].known


def test_of_a_compiled_part_of_neurons_and_a_later_weight_nothing_is_taken_as_known():
    torch.manual_seed(0)
    model = Product()
    part = nn.Sequential(nn.Linear(5, 5), neurons(), nn.Linear(5, 6))
    model.q = torch.compile(part, backend="aot_eager")  # pyright: ignore
    layers = {layer.name: layer for layer in one_step(model).layers}
    assert not layers["of_q"].known
    assert layers["of_k"].known


def test_a_weight_that_is_frozen_at_first_is_found_when_it_trains():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), neurons(), nn.Linear(6, 6), neurons())
    optimizer, frozen = sgd(model), model[2].requires_grad_(False)
    pilot = chi.attach(model, optimizer, steps=3)
    for trains in (False, False, True):
        frozen.weight.requires_grad_(trains)  # pyright: ignore
        optimizer.zero_grad()
        a_pass(model)
        optimizer.step()
        assert pilot.indicators is not None
        assert pilot.layers[1].parameters == ("2.weight",)
        assert pilot.layers[1].known == trains
        assert pilot.indicators.chi.isnan().tolist() == [False, not trains]
    assert pilot.indicators is not None
    assert pilot.indicators.chi[1].item() == chi_of(model, "2.weight")


class Learned(nn.Module):
    """snnTorch's neurons with thresholds that are learned, registered behind all weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 6)
        leaky = peers.snntorch().Leaky
        self.first, self.second = (
            leaky(beta=0.9, learn_threshold=True, spike_grad=chi.Surrogate(width=2.0)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        u, v, out = torch.zeros(()), torch.zeros(()), []
        for x_t in x:
            s, u = self.first(self.a(x_t), u)
            s, v = self.second(self.b(s), v)
            out.append(s)
        return torch.stack(out)


def test_a_learned_threshold_does_not_hide_the_weight():
    torch.manual_seed(0)
    model = Learned()
    pilot = one_step(model)
    assert [(layer.parameters, layer.known) for layer in pilot.layers] == [(("a.weight",), True), (("b.weight",), True)]
    assert pilot.indicators is not None
    assert pilot.indicators.chi.tolist() == [chi_of(model, "a.weight"), chi_of(model, "b.weight")]


class Reused(nn.Module):
    """One module of neurons in two places; a second layer between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 3)
        self.of_a_and_c, self.of_b = neurons(), neurons()

    def forward(self, x: Tensor) -> Tensor:
        return self.of_a_and_c(self.c(self.of_b(self.b(self.of_a_and_c(self.a(x))))))


def test_neurons_in_several_places_have_the_chi_of_all_their_weights():
    torch.manual_seed(0)
    model = Reused()
    pilot = one_step(model)
    assert [layer.parameters for layer in pilot.layers] == [("a.weight", "c.weight"), ("b.weight",)]
    assert pilot.indicators is not None
    assert pilot.indicators.chi.tolist() == [chi_of(model, "a.weight", "c.weight"), chi_of(model, "b.weight")]
    assert all(neuron.on_input is None for neuron in pilot.neurons.neurons), "a graph is not walked in every pass"


class Sums(nn.Module):
    """A sum of a branch of two layers, with a gate on its end or long, and of a shortcut that is nearer or as near."""

    def __init__(self, branch_end: str) -> None:
        super().__init__()
        self.stem, self.norm, self.of_stem = nn.Linear(5, 6), nn.BatchNorm1d(6), neurons()
        self.a, self.of_a, self.b, self.b_norm = nn.Linear(6, 6), neurons(), nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.shortcut, self.gate, self.of_sum = nn.Linear(6, 6), nn.Linear(6, 6), neurons()
        self.branch_end = branch_end

    def forward(self, x: Tensor) -> Tensor:
        s = self.of_stem(self.norm(self.stem(x[0]))[None])
        shortcut = self.shortcut(s)
        y = self.b_norm(self.b(self.of_a(self.a(s)))[0])[None]
        match self.branch_end:
            case "gate":
                y = y * self.gate(y.mean(1, keepdim=True)).sigmoid()
            case "long":
                y = (y * 2).clone().transpose(1, 2).contiguous().transpose(1, 2) + 0 * self.gate(s)
        return self.of_sum(y + shortcut)


@pytest.mark.parametrize("branch_end", ["gate", "long"])
def test_of_a_sum_the_weight_with_the_most_layers_behind_it_counts_and_no_shortcut_or_gate(branch_end):
    torch.manual_seed(0)
    model = Sums(branch_end)
    layers = {layer.name: layer for layer in one_step(model).layers}
    assert layers["of_stem"].parameters == ("stem.weight",)
    assert layers["of_stem"].norm is model.norm
    assert layers["of_a"].parameters == ("a.weight",)
    assert layers["of_a"].norm is None, "the norm before the spikes behind"
    assert layers["of_sum"].parameters == ("b.weight",)
    assert layers["of_sum"].norm is None, "b_norm normalises one term of the sum alone"


class Recurrent(nn.Module):
    """Recurrent neurons, norse's and of a weight outside them; spikes of the later also return to the earlier."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = peers.norse().LIFRecurrentCell(5, 6)
        self.fc, self.again, self.back = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 5, bias=False)
        self.of_fc = chi.Surrogate(width=2.0)

    def forward(self, x: Tensor) -> Tensor:
        state, s, out = None, torch.zeros(7, 6), []
        for x_t in (*x, *x):
            z, state = self.cell(x_t + self.back(s), state)
            s = self.of_fc(self.fc(z) + self.again(s) - 0.1)
            out.append(s)
        return torch.stack(out)


def test_recurrent_neurons_have_the_chi_of_what_comes_in():
    torch.manual_seed(0)
    model = Recurrent()
    chi.prepare(model, width=2.0)
    pilot = one_step(model)
    assert [layer.parameters for layer in pilot.layers] == [("cell.input_weights",), ("fc.weight",)]


def test_an_amplitude_that_scale_rms_has_set_stays_with_the_neurons():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), Neuron(Rule(shape="triangle", scale="rms"), width=2.0))
    optimizer = sgd(model)
    pilot = chi.attach(model, optimizer, target=0.3, target_end=0.3, interval=1)
    for _ in range(3):
        optimizer.zero_grad()
        a_pass(model)
        optimizer.step()
    amplitude, x = pilot.neurons.amplitudes.item(), torch.randn(2, 7, 5)

    def gradient(of: nn.Module) -> Tensor:
        return torch.autograd.grad(of(x).square().sum(), next(iter(of.parameters())))[0]

    attached = gradient(model)
    assert abs(amplitude - 1) > 0.01
    assert torch.equal(gradient(copy.deepcopy(model)), attached)
    pilot.detach()
    assert torch.equal(gradient(model), attached)
    assert chi.attach(model, sgd(model), target_end=0.5).neurons.amplitudes.item() == pytest.approx(amplitude)
