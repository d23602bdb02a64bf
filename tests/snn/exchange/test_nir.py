"""Graphs of NIR: the same spikes after a round trip, in NIR's own equations, and in other simulators."""

import contextlib
import io
from itertools import pairwise
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.snn import losses, neurons
from pipeline.snn.exchange import nir_graph, nir_network
from pipeline.snn.kernels.reference import Rule
from pipeline.snn.networks.network import Network
from pipeline.snn.neurons import Neuron
from tests.snn.exchange.nets import K, digits, frames, handed_on, network
from tests.support import peers

nir = pytest.importorskip("nir", reason="nir is not installed: it is in the extra export")

NETWORKS = [
    ("sew_tiny", 16, {"neuron": "if"}),
    ("sew_cifar8", 16, {"neuron": "lif", "tau": 1.7}),
    ("sew_cifar8", 16, {"neuron": "plif", "tau": 2.3, "connect": "none"}),
    ("small_bottleneck", 16, {"neuron": "if", "T": 3}),
    ("ms_cifar8", 16, {"neuron": "lif", "v_th": 1.0}),
]
IDS = [f"{arch} {model['neuron']}" for arch, _, model in NETWORKS]


def graph_of(net, size: int = 16, **settings) -> Any:
    return nir_graph.from_network(net, image_size=size, **settings)


@pytest.mark.parametrize(("arch", "size", "model"), NETWORKS, ids=IDS)
def test_a_round_trip_by_a_file_gives_the_same_spikes_in_every_layer(arch, size, model, tmp_path):
    net = network(arch, size, **model)
    nir.write(tmp_path / "net.nir", graph_of(net, size))
    back = nir_network.load(tmp_path / "net.nir")
    ours, logits = handed_on(net, digits(4, size))
    theirs, their_logits = handed_on(back, digits(4, size))
    assert ours.keys() == theirs.keys()
    convolutions = [module for module in net.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(ours) == len(convolutions) + 1
    for name, x in ours.items():
        # Spikes and their sums are whole numbers; currents, which MS-ResNet adds, are rounded.
        torch.testing.assert_close(theirs[name], x, rtol=0, atol=1e-12, msg=name)
        assert x.count_nonzero() > 0, f"{name} would be the same whatever happened before"
    torch.testing.assert_close(their_logits, logits, rtol=0, atol=1e-12)
    assert fed(back) == fed(net)


def fed(network: Network) -> dict[str, str]:
    """Each layer of neurons with the convolution or linear layer that feeds it, by the names of nodes."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = {layer.name: names[id(layer.weight)].removeprefix("steps.") for layer in network.spiking_layers()}
    return {name: node.removesuffix(".weight").replace(".", "_") for name, node in found.items()}


def test_neurons_that_only_other_neurons_spikes_feed_are_not_steered():
    one = {"r": np.ones(3), "v_threshold": np.ones(3), "v_reset": np.zeros(3)}
    nodes = {"input": nir.Input(np.array([3])), "w": nir.Linear(np.eye(3)), "first": nir.IF(**one),
             "second": nir.IF(**one), "output": nir.Output(np.array([3]))}  # fmt: skip
    graph = nir.NIRGraph(nodes, list(pairwise(nodes)))
    layers = nir_network.load(graph, T=2, dt=1e-4).spiking_layers()
    assert [layer.name for layer in layers] == ["first"]


@pytest.mark.parametrize(
    "change",
    [
        lambda nodes: nodes["layer1.0.conv1"].weight.__setitem__((0, 0, 1, 1), 2.0),
        lambda nodes: nodes["layer1.0.conv1"].bias.__setitem__(0, 2.0),
        lambda nodes: nodes["layer2.0.sn2"].v_threshold.fill(0.45),
        lambda nodes: nodes["layer2.0.sn2"].tau.fill(2.2e-4),
        lambda nodes: nodes["layer1.0.sn1"].r.fill(1.1),
        lambda nodes: (nodes["sn1"].v_reset.fill(0.1), nodes["sn1"].v_leak.fill(0.1)),
    ],
    ids=["weight", "bias", "threshold", "tau", "r", "reset"],
)
def test_the_spikes_depend_on_every_number_of_the_graph(change):
    net = network(neuron="lif")
    graph = graph_of(net)
    ours, _ = handed_on(net, digits(16))

    def same() -> bool:
        theirs, _ = handed_on(nir_network.load(graph), digits(16))
        return all(torch.equal(x, theirs[name]) for name, x in ours.items())

    assert same()
    change(graph.nodes)
    assert not same()


@pytest.mark.parametrize("dt", [1e-4, 1e-3, 0.5])
@pytest.mark.parametrize("kind", ["if", "lif", "plif"])
def test_a_step_is_one_of_forward_euler_in_nir_s_equations(kind, dt):
    rule = Rule(leaky=kind != "if", v_th=0.6, v_reset=-0.2)
    neuron = Neuron(rule, tau=2.6, learn_tau=kind == "plif").double()
    writer = nir_graph.Writer(dt, torch.float64)
    writer.neurons("n", neuron, writer.input((50,)))
    node: Any = writer.nodes["n"]
    current = torch.rand(30, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 0.5
    v, spikes = node.v_reset.copy(), []
    for x in current.numpy():
        slope = node.r * x if kind == "if" else ((node.v_leak - v) + node.r * x) / node.tau
        v = v + dt * slope
        z = v > node.v_threshold
        v = np.where(z, node.v_reset, v)
        spikes.append(z)
    ours = neuron(current[:, None])[:, 0]
    assert 0.05 < ours.mean() < 0.9
    assert np.array_equal(ours.detach().numpy() > 0, np.stack(spikes))


@pytest.mark.parametrize(("arch", "size", "model"), NETWORKS, ids=IDS)
def test_spikingjelly_reads_the_file_and_computes_the_same(arch, size, model, tmp_path):
    pytest.importorskip("spikingjelly", reason="needs Python 3.11")
    peers.spikingjelly()
    from spikingjelly.activation_based import nir_exchange

    net, images = network(arch, size, **model), digits(4, size)
    nir.write(tmp_path / "net.nir", graph_of(net, size))
    theirs: Any = nir_exchange.import_from_nir(tmp_path / "net.nir", dtype=torch.float64)
    state, logits = None, []
    with torch.no_grad():
        for _ in range(net.T):
            out, state = theirs(images, state)
            logits.append(out)
        torch.testing.assert_close(torch.stack(logits), net(images), rtol=0, atol=1e-12)


def test_snntorch_reads_the_graph_of_leaky_neurons_and_computes_the_same():
    """In fp32, one image at a time: its Flatten is given NIR's dimensions, which leave the batch out."""
    peers.snntorch()
    from snntorch.import_nir import import_from_nir

    net, images = network(neuron="lif"), digits(8)
    graph = graph_of(net.float())
    with contextlib.redirect_stdout(io.StringIO()):  # it tells how it scales thresholds
        theirs: Any = import_from_nir(graph)
    logits = []
    with torch.no_grad():
        for image in images.float():
            for module in theirs.modules():
                if hasattr(module, "reset_mem"):
                    module.reset_mem()
            state, steps = None, []
            for _ in range(net.T):
                out, state = theirs(image, state)
                steps.append(out)
            logits.append(torch.stack(steps))
        # A spike that differs changes a logit by some 1e-3; rounding alone by some 1e-7.
        torch.testing.assert_close(torch.stack(logits, 1), net(images.float()), rtol=0, atol=1e-5)


def test_what_is_read_can_be_trained_and_measured(tmp_path):
    nir.write(tmp_path / "net.nir", graph_of(network(neuron="lif").float()))
    back = nir_network.load(tmp_path / "net.nir", surrogate=Rule(shape="rectangle"), width=2.0)
    state = neurons.bind(back)
    losses.cross_entropy(back.train()(digits(4).float()), torch.tensor([0, 1, 2, 3])).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in back.parameters())
    assert torch.all(state.covered > 0)
    assert {neuron.rule.shape for neuron in state.neurons} == {"rectangle"}
    assert torch.equal(state.widths, torch.full((len(state.names),), 2.0))


EVENT_NETWORKS = [
    ("sew_cifar8", 16, {"neuron": "lif", "T": 3}),
    ("small_bottleneck", 16, {"neuron": "plif", "T": 2}),
    ("ms_cifar8", 16, {"neuron": "if", "v_th": 1.0, "T": 3}),
]


@pytest.mark.parametrize(("arch", "size", "model"), EVENT_NETWORKS, ids=[arch for arch, _, _ in EVENT_NETWORKS])
def test_event_frames_are_fed_one_a_step_and_give_the_same_spikes_here_and_in_spikingjelly(arch, size, model, tmp_path):
    net = network(arch, size, events=True, **model)
    nir.write(tmp_path / "net.nir", graph_of(net, size, event_frames=True))
    said = nir.read(tmp_path / "net.nir").metadata
    assert (said["kind"], said["T"]) == ("events", net.T)
    assert said["readout"] == "mean of the output over T steps; a frame is the input of each"
    back, given = nir_network.load(tmp_path / "net.nir"), frames(4, net.T, size)
    ours, logits = handed_on(net, given)
    theirs, their_logits = handed_on(back, given)
    for name, x in ours.items():
        torch.testing.assert_close(theirs[name], x, rtol=0, atol=1e-12, msg=name)
        assert x.count_nonzero() > 0, f"{name} would be the same whatever happened before"
    torch.testing.assert_close(their_logits, logits, rtol=0, atol=1e-12)
    assert back(frames(1, net.T, size)).shape == (net.T, 1, K)
    with pytest.raises(ValueError, match=r"shape \(4, 2, 16, 16\) are not allowed; use \(T, N, 2, 16, 16\) for event"):
        back(given[0])

    pytest.importorskip("spikingjelly", reason="needs Python 3.11")
    peers.spikingjelly()
    from spikingjelly.activation_based import nir_exchange

    stepped: Any = nir_exchange.import_from_nir(tmp_path / "net.nir", dtype=torch.float64)
    state, steps = None, []
    with torch.no_grad():
        for frame in given:
            out, state = stepped(frame, state)
            steps.append(out)
    torch.testing.assert_close(torch.stack(steps), logits, rtol=0, atol=1e-12)


def test_frames_of_another_number_than_the_file_s_T_are_one_step_each():
    net = network(T=4)
    given = digits(6).unflatten(0, (3, 2))
    back = nir_network.load(graph_of(net), T=2)
    torch.testing.assert_close(back(given), net(given), rtol=0, atol=1e-12)
    assert back(digits(2)).shape == (2, 2, K)
    torch.testing.assert_close(back(digits(2)), net(digits(2))[:2], rtol=0, atol=1e-12)
    with pytest.raises(
        ValueError, match=r"\(1, 3, 8, 8\) are not allowed; use \(N, 3, 16, 16\), or \(T, N, 3, 16, 16\)"
    ):
        back(torch.zeros(1, 3, 8, 8))


def test_the_file_says_what_nir_leaves_open(tmp_path):
    nir.write(tmp_path / "net.nir", graph_of(network(T=3), dt=1e-3, about={"recipe": "digits"}))
    said = nir.read(tmp_path / "net.nir").metadata
    assert (said["recipe"], said["T"], said["dt"], said["fires_at"]) == ("digits", 3, 1e-3, "v >= v_threshold")
    assert said["readout"] == "mean of the output over T steps; an image is the input of each"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"reset": "soft"}, r"cannot say model\.reset='soft' \(sn1\): .*; train with --model\.reset hard"),
        ({"connect": "iand"}, r"cannot say model\.connect='iand' \(layer1\.0\): .*; train with --model\.connect add"),
        ({"connect": "and"}, r"cannot say model\.connect='and'"),
    ],
)
def test_what_nir_cannot_say_is_refused(model, said):
    with pytest.raises(ConfigError, match=said):
        graph_of(network(**model))


def test_other_networks_and_steps_of_no_length_are_refused():
    with pytest.raises(ConfigError, match=r"Linear cannot be written as a graph of NIR; SEW-ResNet and MS-ResNet can"):
        graph_of(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"dt=0 is not allowed; use seconds above 0"):
        graph_of(network(), dt=0)


def line(*nodes: Any, edges=None, extra=None) -> Any:
    """The nodes in a row, with input and output of 2 numbers."""
    all_nodes = {"input": nir.Input({"input": np.array([2])})}
    all_nodes |= {f"n{i}": node for i, node in enumerate(nodes)} | {"output": nir.Output({"output": np.array([2])})}
    names = list(all_nodes)
    made = [*pairwise(names), *(edges or [])]
    return nir.NIRGraph({**all_nodes, **(extra or {})}, made, type_check=False)


def lif(**fields) -> Any:
    values = {"tau": 2e-4, "r": 1.0, "v_leak": 0.0, "v_threshold": 1.0, "v_reset": 0.0} | fields
    return nir.LIF(**{name: np.broadcast_to(value, (2,)).astype(float) for name, value in values.items()})


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        (line(lif(v_leak=0.5)), r"'n0' leaks to v_leak=0\.5 and is reset to v_reset=0; only neurons with one value"),
        (line(lif(tau=5e-5)), r"tau of node 'n0' is 5e-05 s, less than a step of dt=0\.0001; use a smaller dt"),
        (line(lif(v_threshold=[1, 2])), r"v_threshold of node 'n0' has 2 values, 1 to 2; only layers in which"),
        (line(lif(tau=np.nan)), r"tau of node 'n0' has 1 values, nan to nan"),
        (line(nir.Delay(np.ones(2))), r"node 'n0' of this graph is a Delay, which is not read; Input, Output"),
        (line(nir.Linear(np.ones((1, 2, 2)))), r"'n0' of this graph has a weight of shape \(1, 2, 2\)"),
        (line(nir.Linear(np.ones((2, 3)))), r"'n0' .*, a Linear, cannot take the shape \(2,\), .* gets: mat1 and mat2"),
        (line(nir.Linear(np.ones((3, 2)))), r"'output' .* cannot take the shape \(3,\), .* gets: its shape is \(2,\)"),
        (
            line(nir.Linear(np.ones((3, 2))), lif()),
            r"'n1' .*, a LIF, cannot take .*: it has parameters of shape \(2,\)",
        ),
        (line(nir.SumPool2d(2, 2, 0)), r"'n0' .*, a SumPool2d, cannot take .*: it takes 3 dimensions; write"),
        (line(nir.Linear(np.ones((3, 2))), nir.Linear(np.ones((2, 3))), edges=[("input", "n1")]), r"'n1' .* adds"),
        (line(lif(), edges=[("n0", "output")]), r"has the edge 'n0' to 'output' twice; leave one out"),
        (line(nir.Flatten({"input": None}, 0, 3)), r"'n0' .*, a Flatten, cannot take .*: Dimension out of range"),
        (line(lif(), lif(), edges=[("n1", "n0")]), r"has a cycle through 'n\d'; only graphs without"),
        (line(lif(), edges=[("n0", "n7")]), r"an edge 'n0' to 'n7', and no node 'n7'"),
        (line(lif(), extra={"b": lif()}), r"node 'b' of this graph has no input"),
        (line(lif(), extra={"b": nir.Input({"input": np.array([2])})}), r"has 2 nodes Input; it must have one"),
        (line(lif(), edges=[("n0", "a.b"), ("n0", "a_b")], extra={"a.b": lif(), "a_b": lif()}), r"rename one"),
    ],
)
def test_graphs_that_these_neurons_cannot_run_are_refused(graph, said):
    with pytest.raises(ConfigError, match=said) as caught:
        nir_network.load(graph, T=2, dt=1e-4)
    assert "\n" not in str(caught.value)


def test_a_resistance_scales_the_input_and_edges_add():
    graph = line(lif(r=3.0), edges=[("input", "output")])
    x = torch.tensor([[0.5, 0.8]], dtype=torch.float64)
    # h = (3 x) / 2 from v = 0: 0.75, no spike; 1.2, a spike.
    assert nir_network.load(graph, T=1, dt=1e-4)(x).tolist() == [[[0.5, 1.8]]]


def test_a_graph_that_does_not_say_its_dt_needs_it_for_its_neurons():
    current = torch.full((1, 2), 0.6, dtype=torch.float64)
    one = {name: np.full(2, value) for name, value in (("r", 1.0), ("v_threshold", 1.0), ("v_reset", 0.0))}
    for node in (lif(), nir.IF(**one)):
        with pytest.raises(
            ConfigError, match=r"^dt is not given, .* such as 'n0', .*; use dt=1e-4 for .*, dt=1 for IF of"
        ):
            nir_network.load(line(node), T=2)
    assert nir_network.load(line(nir.IF(**one)), T=2, dt=1)(current).tolist() == [[[0, 0]], [[1, 1]]]
    only_weights = line(nir.Linear(np.eye(2)))
    assert torch.equal(nir_network.load(only_weights, T=1)(current)[0], current)


def test_norse_s_graphs_have_parameters_of_one_number_and_give_its_spikes():
    norse = peers.norse()
    from norse.torch.utils.export_nir import to_nir

    torch.manual_seed(0)
    current = torch.rand(40, 3, 6, dtype=torch.float32)
    # norse writes tau = dt / (1 / tau), so its step of 1e-3 s is one of 1e-6 s in its graph; its IF has no dt.
    for make, dt, scale in ((norse.LIFBoxCell, 1e-6, 240.0), (norse.IAFCell, 1.0, 8.0)):
        theirs = norse.SequentialState(torch.nn.Linear(6, 8), make(), torch.nn.Linear(8, 5), make())
        theirs[2].weight.data *= 40
        state, spikes = None, []
        for x in current * scale:
            out, state = theirs(x, state)
            spikes.append(out)
        graph: Any = to_nir(theirs, current[0, 0])
        assert graph.nodes["1"].r.shape == ()
        ours = nir_network.load(graph, T=1, dt=dt)(current * scale)
        assert 0.05 < ours.mean() < 0.9
        assert torch.equal(ours, torch.stack(spikes))


def test_depthwise_convolutions_and_parameters_of_one_element_are_read(tmp_path):
    torch.manual_seed(0)
    conv: Any = torch.nn.Conv2d(4, 8, 3, groups=4)
    one = {"tau": 2.0, "r": 1.0, "v_leak": 0.0, "v_threshold": 0.2, "v_reset": 0.0}
    nodes = {
        "input": nir.Input(np.array([4, 6, 6])),
        "conv": nir.Conv2d((6, 6), conv.weight.detach().numpy(), 1, 0, 1, 4, conv.bias.detach().numpy()),
        "lif": nir.LIF(**{name: np.array([value], np.float32) for name, value in one.items()}),
        "output": nir.Output(np.array([8, 4, 4])),
    }
    nir.write(tmp_path / "net.nir", nir.NIRGraph(nodes, list(pairwise(nodes)), type_check=False))
    images = torch.rand(5, 4, 6, 6)
    spikes = nir_network.load(tmp_path / "net.nir", T=3, dt=1)(images)
    assert spikes.mean() > 0.05
    neuron = Neuron(Rule(leaky=True, v_th=one["v_threshold"]), tau=2.0)
    assert torch.equal(spikes, neuron(conv(images)[None], num_steps=3))


def test_numbers_are_the_same_up_to_the_rounding_of_fp32():
    near = 1 + 2.0**-22
    for fields in ({"v_threshold": [1, near]}, {"v_leak": 0.1, "v_reset": 0.1 * near}, {"tau": 1e-4 / near}):
        nir_network.load(line(lif(**fields)), T=1, dt=1e-4)
    layer = nir_network.load(line(lif(r=np.float32(0.1) * 10)), T=1, dt=1e-4)
    assert layer.gains == {}
    far = 1.0001
    for fields in ({"v_threshold": [1, far]}, {"v_leak": 0.1, "v_reset": 0.1 * far}, {"tau": 1e-4 / far}):
        with pytest.raises(ConfigError, match=r"'n0'"):
            nir_network.load(line(lif(**fields)), T=1, dt=1e-4)


def test_a_graph_has_one_dtype_and_other_images_are_refused():
    mixed = line(nir.Linear(np.eye(2, dtype=np.float32)), nir.Affine(np.eye(2), np.zeros(2, np.float32)))
    net = nir_network.load(mixed, T=1)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float64}
    assert net(torch.ones(1, 2, dtype=torch.float64)).dtype == torch.float64
    said = r"^images of dtype torch\.float32 are not allowed, the network's weights are torch\.float64; use images\.to"
    with pytest.raises(ValueError, match=said + r"\(torch\.float64\), or network\.float\(\)$"):
        net(torch.ones(1, 2))
    assert net.float()(torch.ones(1, 2)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.ones(1, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    single = nir_network.load(line(nir.Affine(np.eye(2, dtype=np.float32), np.zeros(2))), T=1)
    assert {parameter.dtype for parameter in single.parameters()} == {torch.float32}


def test_files_that_are_no_graphs_and_an_unknown_T_are_refused(tmp_path):
    (tmp_path / "net.nir").write_bytes(b"no graph")
    with pytest.raises(ConfigError, match=r"net\.nir cannot be read as a graph of NIR"):
        nir_network.load(tmp_path / "net.nir", T=1)
    with pytest.raises(ConfigError, match=r"no\.nir cannot be read as a graph of NIR"):
        nir_network.load(tmp_path / "no.nir", T=1)
    with h5py.File(tmp_path / "net.nir", "w") as file:
        file["node/type"] = "Linear"
    with pytest.raises(ConfigError, match=r"net\.nir cannot be read as a graph of NIR"):
        nir_network.load(tmp_path / "net.nir", T=1)
    with pytest.raises(ConfigError, match=r"T='4' is not allowed; say how many"):
        nir_network.load(nir.NIRGraph({}, [], metadata={"T": "4"}))
    with pytest.raises(ConfigError, match=r"T=None is not allowed; say how many time steps"):
        nir_network.load(line(lif()))
    with pytest.raises(ConfigError, match=r"dt=-1\.0 is not allowed"):
        nir_network.load(line(lif()), T=1, dt=-1.0)


def test_weights_keep_the_dtype_of_the_network():
    assert graph_of(network().float()).nodes["conv1"].weight.dtype == np.float32
    assert graph_of(network()).nodes["conv1"].weight.dtype == np.float64
