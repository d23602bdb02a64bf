"""snn/networks/own.py: networks with neurons of SpikingJelly, snnTorch and norse."""

import pytest
import torch

from pipeline.snn import energy, membrane_probe
from pipeline.snn.neurons import bind
from tests.snn.own_nets import JELLY, TORCH, built, written
from tests.support import peers


def test_neurons_of_spikingjelly_get_our_surrogate_and_are_reset(tmp_path):
    peers.spikingjelly()
    network = built(written(tmp_path, JELLY), width=0.7)
    (layer,) = network.spiking_layers()
    assert (layer.name, layer.neuron.rule.shape, layer.neuron.width) == ("net.2.surrogate_function", "triangle", 0.7)
    assert layer.weight is network.get_parameter("net.0.weight")
    neurons, images = bind(network), torch.randn(2, 3, 8, 8)
    first = network(images)
    first.sum().backward()
    assert neurons.neuron_steps.tolist() == [4 * 2 * 4 * 36]
    assert torch.equal(network(images), first), "the potentials of the last pass are gone"
    measured = energy.measure(network, images)
    assert 0 < measured.firing_rates["net.2.surrogate_function"] < 1
    assert [layer.name for layer in measured.layers] == ["net.0", "net.4"]
    assert measured.layers[1].acs > 0


@pytest.mark.parametrize(
    ("made", "learned"),
    [
        ("PSN(model.T)", ()),
        ("MaskedPSN(2, model.T, step_mode='m')", ()),
        ("SlidingPSN(2, step_mode='m')", ("bias",)),
        ("ParametricLIFNode(step_mode='m')", ("w",)),
        ("KLIFNode(step_mode='m')", ("k",)),
        ("GatedLIFNode(model.T)", ("alpha", "tau", "v_threshold")),
    ],
)
def test_neurons_of_spikingjelly_learn_also_what_has_no_dimension_there(made, learned, tmp_path):
    peers.spikingjelly()
    network = built(written(tmp_path, JELLY.replace("LIFNode(step_mode='m')", made)))
    (layer,) = network.spiking_layers()
    assert layer.weight is network.get_parameter("net.0.weight")
    images = torch.randn(2, 3, 8, 8)
    network(images).square().sum().backward()
    before = {name: network.get_parameter(f"net.2.{name}") for name in learned}
    assert all(one.shape == (1,) and one.grad is not None and one.grad.any() for one in before.values())


@pytest.mark.parametrize("made", ["ComplementaryLIFNode(step_mode='m')", "SLTTLIFNode()"])
def test_neurons_with_another_step_function_in_evaluation_are_seen_there_too(made, tmp_path):
    peers.spikingjelly()
    text = JELLY.replace("LIFNode(step_mode='m')", made)
    if "SLTT" in made:
        text = text.replace("neuron.SLTT", "layer.MultiStepContainer(neuron.SLTT").replace("Node(),", "Node()),")
    network, images = built(written(tmp_path, text)), torch.randn(2, 3, 8, 8)
    (layer,) = network.spiking_layers()
    reference = network(images)
    network.eval()
    network.get_submodule("net.1").train()  # the batch's statistics, as above
    assert torch.equal(network(images), reference)
    measured = energy.measure(network, images)
    assert list(measured.firing_rates) == [layer.name]
    assert measured.layers[1].macs == 0
    assert measured.layers[1].acs > 0
    network.train()
    assert layer.neuron.training
    assert all(module.training for module in network.modules())


def test_neurons_whose_potential_alone_is_read_out_keep_their_width(tmp_path, caplog):
    peers.snntorch()
    text = TORCH.replace("out.append(self.fc2(s))", "_, out_mem = self.read(self.fc2(s), out_mem); out.append(out_mem)")
    text = text.replace("mem, out = ", "out_mem = self.read.init_leaky(); mem, out = ")
    text = text.replace("self.lif = ", "self.read = snntorch.Leaky(beta=0.8); self.lif = ")
    network = built(written(tmp_path, text), T=3)
    assert [layer.name for layer in network.spiking_layers()] == ["lif.spike_grad"]
    assert "The neurons read.spike_grad keep their width: no gradient flows through their spikes" in caplog.text
    assert bind(network).names == ("lif.spike_grad",)
    assert "read.spike_grad" in energy.measure(network, torch.randn(2, 3, 8, 8)).firing_rates


def test_the_energy_of_recurrent_neurons_counts_the_spikes_that_return(tmp_path):
    peers.snntorch()
    text = TORCH.replace("Leaky(beta=0.9)", "RLeaky(beta=0.9, linear_features=8)")
    text = text.replace("mem, out = self.lif.init_leaky(), []", "(s, mem), out = self.lif.init_rleaky(), []")
    text = text.replace("self.fc1(images.flatten(1)), mem)", "self.fc1(images.flatten(1)), s, mem)")
    network = built(written(tmp_path, text), T=3)
    measured = {layer.name: layer for layer in energy.measure(network, 2 * torch.rand(2, 3, 8, 8)).layers}
    assert measured["lif.recurrent"].macs == 0
    assert measured["lif.recurrent"].acs > 0
    assert measured["fc1"].acs == 0


@pytest.mark.parametrize("hidden", [False, True])
def test_neurons_of_snntorch_count_every_time_step_and_leave_no_state_behind(hidden, tmp_path):
    peers.snntorch()
    text = TORCH.replace("beta=0.9", "beta=0.9, init_hidden=True") if hidden else TORCH
    text = text.replace(
        "s, mem = self.lif(self.fc1(images.flatten(1)), mem)", "s = self.lif(self.fc1(images.flatten(1)))"
    )
    network = built(written(tmp_path, text if hidden else TORCH), T=3)
    (layer,) = network.spiking_layers()
    shapes = {name: buffer.shape for name, buffer in network.named_buffers()}
    for N in (2, 3):
        network(torch.randn(N, 3, 8, 8)).sum().backward()
    assert {name: buffer.shape for name, buffer in network.named_buffers()} == shapes
    assert layer.weight is network.get_parameter("fc1.weight")
    measured = energy.measure(network, torch.randn(2, 3, 8, 8))
    assert measured.layers[0].macs == 3 * 3 * 64 * 8, "analog input, in each of three steps"
    assert measured.layers[1].input_rate is not None
    assert 0 < measured.layers[1].input_rate < 1
    rate = measured.firing_rates["lif.spike_grad"]
    assert rate == pytest.approx(measured.layers[1].input_rate), "its own spikes, without those that the reset asks for"
    _, by_step = membrane_probe.by_time_step(network, torch.randn(2, 3, 8, 8), bind(network))
    assert by_step.shape == (1, 3)
