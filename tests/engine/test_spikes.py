"""engine/insight/spikes.py: the report shows the network's own spikes and potentials, and looking changes nothing."""

import itertools
import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.config import ModelConfig
from pipeline.data.prefetcher import Batch
from pipeline.engine import load_network
from pipeline.engine.insight import spikes
from pipeline.engine.insight.spikes import Spikes
from pipeline.snn import membrane_probe, surrogate
from pipeline.snn.external_neurons import Surrogate
from pipeline.snn.kernels.reference import Rule
from pipeline.snn.networks import sew_resnet
from pipeline.snn.neurons import Neuron, bind

CLASSES = ("zero", "one", "two")


def batch(*, T: int = 0, n: int = 6, side: int = 8, channels: int = 3) -> Batch:
    """Random images, or frames if T is given."""
    generator = torch.Generator().manual_seed(3)
    shape = (n, channels, side, side)
    images = torch.randn(*((T, *shape) if T else shape), generator=generator)
    return Batch(images, torch.arange(n) % 3, torch.ones(n, dtype=torch.bool), 40)


def looked(network: nn.Module, of: Batch) -> dict:
    """What Spikes makes of one batch."""
    seen = Spikes(bind(network), T=network.T, keeps=True)  # pyright: ignore[reportArgumentType]
    network.eval()
    with torch.no_grad():
        seen.samples.see(of, network(of.images).float().mean(0))
    seen.look(network)
    return json.loads(json.dumps(seen.document(step=7, weights="last", split="val", classes=CLASSES), allow_nan=False))


def rates_alone(network: nn.Module, images: torch.Tensor) -> list[float]:
    """The layers' own count of their firing rate, of these images."""
    rates: list[float] = []
    layers = network.spiking_layers()  # pyright: ignore[reportCallIssue]
    for layer in layers:
        layer.neuron.watch = rates.append
    with torch.no_grad():
        network(images)
    for layer in layers:
        layer.neuron.watch = None
    assert len(rates) == len(layers)
    order = {id(layer.neuron): rate for layer, rate in zip(in_order_of_run(network, images), rates, strict=True)}
    return [order[id(layer.neuron)] for layer in layers]


def in_order_of_run(network: nn.Module, images: torch.Tensor) -> list:
    """The spiking layers as the forward pass meets them: a shortcut's come before those of its branch."""
    met: list[int] = []
    layers = network.spiking_layers()  # pyright: ignore[reportCallIssue]
    for index, layer in enumerate(layers):
        layer.neuron.watch = lambda _rate, index=index: met.append(index)
    with torch.no_grad():
        network(images)
    return [layers[index] for index in met]


@pytest.mark.parametrize("neuron", ["if", "lif", "plif"])
@pytest.mark.parametrize("T", [0, 5], ids=["images", "frames"])
def test_the_raster_has_as_many_spikes_as_the_layers_count_for_that_sample(neuron, T):
    model = ModelConfig(neuron=neuron, width=0.7, T=4, v_th=0.25)
    torch.manual_seed(1)
    network = sew_resnet.build(model, num_classes=3, in_channels=2 if T else 3, image_size=8).eval()
    of = batch(T=T, channels=2 if T else 3)
    document = looked(network, of)
    slot = document["sample"]["number"] - of.position
    alone = of.images[..., slot : slot + 1, :, :, :]
    counted = rates_alone(network, alone)
    assert document["num_steps"] == (T or 4)
    assert len(document["layers"]) == len(counted) == 6
    for layer, rate in zip(document["layers"], counted, strict=True):
        neuron_steps = layer["num_neurons"] * document["num_steps"]
        assert len(layer["spikes"]) == document["num_steps"]
        assert sum(layer["spikes"]) == round(rate * neuron_steps)
        assert rate * neuron_steps == pytest.approx(round(rate * neuron_steps), abs=0.01)
    assert sum(sum(layer["spikes"]) for layer in document["layers"]) > 100


class Own(nn.Module):
    """A user's network: linear layers feed neurons, and one layer has another library's form."""

    def __init__(self, shape: str = "triangle", form: str = "steps", T: int = 3) -> None:
        super().__init__()
        self.T, self.form = T, form
        self.first, self.second = nn.Linear(192, 20), nn.Linear(20, 500)
        self.sn1, self.sn2 = Neuron(Rule(shape=shape), width=0.6), Surrogate(shape, width=0.4)
        self.head = nn.Linear(500, 3)
        self.seen: dict[str, torch.Tensor] = {}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.first(images.flatten(1)).expand(self.T, len(images), 20)
        self.seen["sn1"] = spikes = self.sn1(x)
        u = self.second(spikes)
        if self.form == "steps":
            out = torch.stack([self.sn2(step) for step in u])
        elif self.form == "flat":
            out = self.sn2(u.flatten(0, 1)).unflatten(0, (self.T, -1))
        elif self.form == "whole":
            out = self.sn2(u)
        elif self.form == "parallel":  # as SpikingJelly's PSN calls its surrogate
            out = self.sn2(u.flatten(1)).unflatten(1, u.shape[1:])
        else:  # the images are not in the first dimensions
            out = self.sn2(u.permute(2, 0, 1)).permute(1, 2, 0)
        self.seen["sn2"] = out
        return self.head(out)


@pytest.mark.parametrize(
    ("form", "T"),
    [*itertools.product(["steps", "flat", "whole"], [1, 3, 6, 12]), ("parallel", 1), ("parallel", 3), ("parallel", 12)],
)
def test_the_rows_are_the_spikes_of_the_neurons_that_they_name(form, T):
    """As many steps as images too, of which there are 6."""
    torch.manual_seed(0)
    network, of = Own(form=form, T=T), batch()
    document = looked(network, of)
    slot = document["sample"]["number"] - of.position
    small, large = document["layers"]
    assert small["shown"] == list(range(20)), "all neurons of a small layer"
    assert len(large["shown"]) == spikes.MOST
    for layer, name in ((small, "sn1"), (large, "sn2")):
        truth = network.seen[name][:, slot]  # (T, neurons)
        assert layer["spikes"] == truth.sum(1).tolist()
        expected = ["".join(str(int(s)) for s in truth[:, neuron]) for neuron in layer["shown"]]
        assert layer["rows"] == expected
    assert sum(row.count("1") for row in small["rows"]) == sum(small["spikes"]) > 0


@pytest.mark.parametrize(("form", "T", "n"), [("turned", 3, 7), ("parallel", 6, 6)])
def test_a_layer_whose_images_cannot_be_told_apart_has_no_rows(form, T, n):
    torch.manual_seed(0)
    network, of = Own(form=form, T=T), batch(n=n)
    document = looked(network, of)
    assert document["layers"][1]["rows"] == document["layers"][1]["spikes"] == []
    assert document["layers"][0]["rows"]
    assert [one["layer"] for one in document["potentials"]] == [0, 1], "a histogram needs no order"


def test_a_layer_that_runs_less_often_than_others_has_no_rows():
    torch.manual_seed(0)
    network = Own()
    network.sn1.forward = torch.no_grad()(lambda x: (x > 0).to(x.dtype))  # pyright: ignore[reportAttributeAccessIssue]
    document = looked(network, batch())
    assert document["layers"][0] == {"num_neurons": 0, "spikes": [], "shown": [], "rows": []}, "it was not called"
    assert len(document["layers"][1]["spikes"]) == 3
    step, network = Own.forward, Own()

    def again_by_steps(images: torch.Tensor) -> torch.Tensor:
        network.sn2(torch.ones(len(images), 500))
        return step(network, images)

    network.forward = again_by_steps
    first, second = looked(network, batch())["layers"]
    assert first["rows"] == []
    assert len(second["rows"][0]) == 4


def test_a_layer_that_runs_more_often_than_most_has_no_rows_and_takes_none_from_the_others():
    """As attention does whose neurons get (T, heads, N, …)."""
    torch.manual_seed(0)
    network = Own()
    network.sn3 = heads = Surrogate()

    def with_heads(images: torch.Tensor) -> torch.Tensor:
        for _head in range(4):
            heads(torch.ones(network.T, len(images), 5))
        return Own.forward(network, images)

    network.forward = with_heads
    *ours, odd = looked(network, batch())["layers"]
    assert [len(layer["rows"][0]) for layer in ours] == [3, 3]
    assert odd["rows"] == odd["spikes"] == []


def test_a_raster_of_many_steps_and_neurons_is_cut():
    torch.manual_seed(0)
    network = sew_resnet.build(ModelConfig(), num_classes=3, image_size=8)
    document = looked(network, batch(T=spikes.STEPS + 1, n=2))
    assert document["num_steps"] == spikes.STEPS + 1
    for layer in document["layers"]:
        assert len(layer["spikes"]) == spikes.STEPS + 1, "of all steps"
        assert {len(row) for row in layer["rows"]} == {min(spikes.STEPS, spikes.CELLS // (6 * spikes.MOST))}


@pytest.mark.parametrize(("precision", "dtype"), [("fp64", torch.float64), ("fp16", torch.float16)])
def test_a_network_of_another_precision_gets_its_images_in_it(precision, dtype):
    torch.manual_seed(0)
    network, of = sew_resnet.build(ModelConfig(), num_classes=3, image_size=8), batch()
    load_network.cast(network, precision)
    seen = Spikes(bind(network), T=network.T, keeps=True)
    seen.samples.see(of, torch.randn(6, 3))
    of.images.zero_()  # the loader may use its memory again
    inputs = []
    network.register_forward_pre_hook(lambda _module, given: inputs.append(given[0]))
    seen.look(network)
    assert [given.dtype for given in inputs] == [dtype]
    assert inputs[0].abs().sum() > 0
    assert all(
        len(layer["rows"]) > 0
        for layer in seen.document(step=1, weights="last", split="val", classes=CLASSES)["layers"]
    )


@pytest.mark.parametrize("shape", surrogate.SHAPES)
def test_the_histograms_are_those_of_the_potentials_and_the_curve_is_the_surrogate(shape):
    torch.manual_seed(2)
    model = ModelConfig(surrogate=shape, width=0.7)
    network, of = sew_resnet.build(model, num_classes=3, image_size=8).eval(), batch()
    state = bind(network)
    state.widths.copy_(torch.linspace(0.3, 0.9, 6))
    seen = Spikes(state, T=network.T, keeps=True)
    seen.samples.see(of, torch.randn(6, 3))
    seen.look(network)
    document = seen.document(step=1, weights="last", split="val", classes=CLASSES)
    potentials: dict[int, list[torch.Tensor]] = {}
    with torch.no_grad(), membrane_probe.probed(state.neurons, lambda i, u: potentials.setdefault(i, []).append(u)):
        network(of.images)
    assert [one["layer"] for one in document["potentials"]] == [0, 3, 5], "first, middle, last"
    for one in document["potentials"]:
        u, width = torch.cat(potentials[one["layer"]]).flatten().double().numpy(), one["width"]
        assert width == pytest.approx(0.3 + 0.12 * one["layer"])
        assert one["coverage_ratio"] == pytest.approx((np.abs(u) < np.float32(width)).mean(), abs=1e-9)
        assert one["firing_rate_ratio"] == pytest.approx((u >= 0).mean(), abs=1e-9)
        assert sum(one["counts"]) + one["below"] + one["above"] == u.size
        assert (one["below"] + one["above"]) / u.size < 0.011
        assert one["bounded"] == (shape in surrogate.BOUNDED)
        assert one["low"] <= -1.1 * width
        assert one["high"] >= 1.1 * width
        edges = np.linspace(one["low"], one["high"], spikes.BINS + 1)
        assert one["counts"][10] == ((u >= edges[10]) & (u < edges[11])).sum()
        at, values = (torch.tensor(column, dtype=torch.float64) for column in zip(*one["curve"], strict=True))
        true = surrogate.derivative(
            at, torch.tensor(width).double(), torch.tensor(1.0).double(), shape=shape, scale="area"
        )
        torch.testing.assert_close(values, true, rtol=1e-3, atol=1e-5)
        assert {round(-width, 4), 0.0, round(width, 4)} <= {round(value, 4) for value in at.tolist()} | {
            round(value + side, 4) for value in at.tolist() for side in (-1e-4 * width, 1e-4 * width)
        }


def test_looking_changes_no_state_and_draws_no_random_number():
    torch.manual_seed(5)
    network, of = sew_resnet.build(ModelConfig(neuron="plif"), num_classes=3, image_size=8), batch()
    state = bind(network)
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    vectors = [state.widths.clone(), state.amplitudes.clone(), state.counts()]
    generators = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    seen = Spikes(state, T=network.T, keeps=True)
    kept = of.images.clone()
    seen.samples.see(of, torch.randn(6, 3, generator=torch.Generator().manual_seed(1)))
    kinds = []
    network.register_forward_hook(lambda _module, _given, logits: kinds.append(logits.requires_grad))
    seen.look(network)
    seen.document(step=1, weights="last", split="val", classes=CLASSES)
    assert kinds == [False], "nothing is kept for a backward pass"
    assert network.training
    assert all(module.training for module in network.modules())
    assert all(neuron.probe is None for neuron in state.neurons)
    assert all(parameter.grad is None for parameter in network.parameters())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for now, then in zip([state.widths, state.amplitudes, state.counts()], vectors, strict=True):
        assert torch.equal(now, then)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert pickle.dumps(np.random.get_state()) == generators[1]
    assert torch.equal(of.images, kept)


@given(st.integers(1, 10**6), st.integers(1, 40))
def test_the_neurons_shown_are_some_of_the_layer(size, most):
    shown = spikes.neurons_shown(size, most)
    assert len(shown) == len(set(shown)) <= most
    assert min(shown) >= 0
    assert max(shown) < size
    assert shown == sorted(shown)
    assert len(shown) >= min(size, most) * 0.5
    if size >= 40 * most >= 200:
        quarters = Counter(4 * neuron // size for neuron in shown)
        assert all(abs(quarters[quarter] - len(shown) / 4) <= 3 for quarter in range(4)), "all channels alike"


def test_they_are_not_all_at_one_place_of_the_image():
    columns = {neuron % 16 for neuron in spikes.neurons_shown(64 * 16 * 16, 32)}
    assert len(columns) >= 10


def test_three_layers_of_few():
    assert [spikes.three(count) for count in (1, 2, 3, 33)] == [{0}, {0, 1}, {0, 1, 2}, {0, 16, 32}]
