"""`chi.prepare`: neurons of SpikingJelly, snnTorch and norse with our surrogate in the place of theirs."""

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import chi
from pipeline.errors import ConfigError
from pipeline.snn.external_neurons import Surrogate
from pipeline.snn.networks import foreign
from tests.support import peers

T, N, C = 3, 5, 8


class Triangle(torch.autograd.Function):
    """The triangle of width 1 as a library's own surrogate would be written; fires from `u >= 0`."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return (u >= 0).to(u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return grad * (1 - u.abs()).clamp_min(0)


def x() -> Tensor:
    return torch.randn(T, N, C, generator=torch.Generator().manual_seed(3)) + 0.6


SPIKINGJELLY: dict[str, dict] = {
    "IFNode": {"detach_reset": True},
    "LIFNode": {},
    "ParametricLIFNode": {},
    "QIFNode": {},
    "EIFNode": {},
    "IzhikevichNode": {},
    "KLIFNode": {},
    "CUBALIFNode": {},
    "GatedLIFNode": {"T": T},
    "ComplementaryLIFNode": {},
    "SimpleIFNode": {},
    "SimpleLIFNode": {"tau": 2.0, "decay_input": True},
    "PSN": {"T": T},
    "MaskedPSN": {"T": T, "k": 2},
    "SlidingPSN": {"k": 2},
    "SLTTLIFNode": {},
}


def run_spikingjelly(neuron: nn.Module, sequence: Tensor) -> Tensor:
    neuron.step_mode = "m"  # pyright: ignore
    return neuron(sequence)


@pytest.mark.parametrize("name", SPIKINGJELLY)
def test_spikingjelly_s_neurons_get_our_gradient(name):
    jelly = peers.spikingjelly()

    class Theirs(jelly.surrogate.PiecewiseQuadratic):  # a subclass: their fused form rounds in another order
        pass

    torch.manual_seed(1)  # some have random weights: with these all spike
    plain = nn.Sequential(getattr(jelly.neuron, name)(surrogate_function=Theirs(alpha=1.0), **SPIKINGJELLY[name]))
    prepared = copy.deepcopy(plain)
    assert chi.prepare(prepared) == {"0": "Theirs(alpha=1) → triangle, width 1"}
    assert list(prepared.state_dict()) == list(plain.state_dict())
    assert chi.prepare(prepared) == {}
    results = []
    for model in (plain, prepared):
        sequence = x().requires_grad_()
        out = run_spikingjelly(model[0], sequence)
        (out * torch.arange(1, 1 + C)).sum().backward()
        results.append((out.detach(), sequence.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert results[0][1].abs().sum() > 0
    assert results[0][0].sum() > 0


@pytest.mark.parametrize("name", ["TernaryIFNode", "ILIFNode", "LIAFNode", "DSRIFNode"])
def test_spikingjelly_s_neurons_that_are_no_step_of_one_potential_are_refused(name):
    jelly = peers.spikingjelly()
    kind = getattr(jelly.neuron, name)
    needed = {"act": torch.relu, "threshold_related": True, "T": T}
    parameters = inspect.signature(kind.__init__).parameters
    given = {
        key: value for key, value in needed.items() if key in parameters and parameters[key].default is inspect._empty
    }
    model = nn.Sequential(jelly.neuron.IFNode(), kind(**given))
    before = model[0].surrogate_function
    with pytest.raises(ConfigError, match=rf"cannot take our surrogate, and nothing was changed: 1 \({name}\): "):
        chi.prepare(model)
    assert model[0].surrogate_function is before


SNNTORCH: dict[str, dict] = {
    "Leaky": {"beta": 0.9},
    "Synaptic": {"alpha": 0.9, "beta": 0.8},
    "Lapicque": {"beta": 0.9, "threshold": 0.1},
    "Alpha": {"alpha": 0.9, "beta": 0.8, "threshold": 0.1},
    "RLeaky": {"beta": 0.9, "linear_features": C},
    "RSynaptic": {"alpha": 0.9, "beta": 0.8, "linear_features": C},
    "SLSTM": {"input_size": C, "hidden_size": C, "threshold": 0.1},
    "LeakyParallel": {"input_size": C, "hidden_size": C, "beta": 0.9},
    "DeltaLeaky": {"beta": 0.9},
}


def run_snntorch(neuron: nn.Module, sequence: Tensor) -> Tensor:
    if type(neuron).__name__ == "LeakyParallel":
        return neuron(sequence)
    state: Any = [(None, None)] if type(neuron).__name__ == "DeltaLeaky" else []
    out = []
    for step in sequence:
        spikes, *state = neuron(step, *state)
        out.append(spikes)
    return torch.stack(out)


@pytest.mark.parametrize("name", SNNTORCH)
def test_snntorch_s_neurons_get_our_gradient(name):
    snn = peers.snntorch()
    results = []
    for ours in (False, True):
        torch.manual_seed(0)
        neuron = getattr(snn, name)(spike_grad=Triangle.apply, **SNNTORCH[name])
        model = nn.Sequential(neuron)
        keys = list(model.state_dict())
        if ours:
            changes = chi.prepare(model)
            assert changes == {"0": "Triangle → triangle, width 1"}
            assert list(model.state_dict()) == keys
            assert chi.prepare(model) == {}
        sequence = x().requires_grad_()
        out = run_snntorch(neuron, sequence)
        (out * torch.arange(1, 1 + C)).sum().backward()
        results.append((out.detach(), sequence.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert results[0][1].abs().sum() > 0
    assert results[0][0].sum() > 0


def test_a_function_that_snntorch_s_neurons_share_becomes_a_surrogate_for_each():
    snn = peers.snntorch()
    shared = snn.surrogate.fast_sigmoid(slope=25)
    model = nn.ModuleList([snn.Leaky(beta=0.9, spike_grad=shared), snn.Leaky(beta=0.9, spike_grad=shared)])
    assert foreign.unsteered(model) == {"0": "fast_sigmoid", "1": "fast_sigmoid"}
    assert chi.prepare(model, "rectangle", width=0.5) == {
        "0": "fast_sigmoid → rectangle, width 0.5",
        "1": "fast_sigmoid → rectangle, width 0.5",
    }
    assert model[0].spike_grad is not model[1].spike_grad
    assert foreign.unsteered(model) == {}


@pytest.mark.parametrize("settings", [{"surrogate_disable": True}, {"inhibition": True}])
@pytest.mark.filterwarnings("ignore:Inhibition")
def test_what_bypasses_snntorch_s_surrogate_is_refused(settings):
    with pytest.raises(ConfigError, match=rf"0 \(Leaky\): {next(iter(settings))}=True.*leave that out"):
        chi.prepare(nn.Sequential(peers.snntorch().Leaky(beta=0.9, **settings)))


@pytest.mark.parametrize("name", ["LIFCell", "LIFBoxCell", "IAFCell", "LIFExCell", "LIFAdExCell", "LIFRecurrentCell"])
def test_norse_s_cells_get_our_gradient(name, monkeypatch):
    norse = peers.norse()
    results = []
    for ours in (False, True):
        torch.manual_seed(0)
        needs = (C, C) if "Recurrent" in name else ()
        cell = getattr(norse, name)(*needs, dt=0.01) if name != "IAFCell" else norse.IAFCell()
        model = nn.ModuleList([cell])
        keys = list(model.state_dict())
        if ours:
            assert list(chi.prepare(model)) == ["0"]
            assert list(model.state_dict()) == keys
            assert chi.prepare(model) == {}
        else:  # norse's own call, with the triangle in the place of its method
            function = cell.activation
            monkeypatch.setitem(function.__globals__, "threshold", lambda u, *_: Triangle.apply(u))
        sequence, state, out = (3 * x()).requires_grad_(), None, []
        for step in sequence:
            spikes, state = cell(step, state)
            out.append(spikes)
        spikes = torch.stack(out)
        (spikes * torch.arange(1, 1 + C)).sum().backward()
        results.append((spikes.detach(), sequence.grad))
        monkeypatch.undo()
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert results[0][1].abs().sum() > 0


def test_a_norse_cell_that_fires_elsewhere_is_refused():
    norse = peers.norse()
    model = nn.ModuleList([norse.LIFRefracCell()])
    with pytest.raises(ConfigError, match=r"0 \(LIFRefracCell\): its step does not call threshold\(\) itself"):
        chi.prepare(model)


def test_a_copy_of_a_prepared_norse_cell_calls_its_own_surrogate():
    model = nn.ModuleList([peers.norse().LIFCell()])
    chi.prepare(model)
    model[0](x()[0])
    other = copy.deepcopy(model)
    seen: list[Tensor] = []
    other[0].activation.surrogate.probe = seen.append  # pyright: ignore
    other[0](x()[0])
    assert len(seen) == 1
    model[0](x()[0])
    assert len(seen) == 1


class Holder(nn.Module):
    """A hand-written neuron."""

    def __init__(self, surrogate: nn.Module) -> None:
        super().__init__()
        self.spike = surrogate

    def forward(self, current: Tensor) -> Tensor:
        return self.spike(current - 1)


def test_one_object_in_several_neurons_becomes_one_for_each():
    one = Surrogate("rectangle", width=0.25)
    twice = Holder(Surrogate())
    model = nn.Sequential(Holder(one), Holder(one), twice, twice)
    assert foreign.shared(model) == [["0", "1"]], "the same module used twice is one neuron"
    assert chi.prepare(model) == {"1": "a chi.Surrogate shared with 0 → its own"}
    assert foreign.shared(model) == []
    assert (model[1].spike.rule, model[1].spike.width) == (one.rule, 0.25)  # pyright: ignore
    assert chi.prepare(model) == {}


def test_a_library_s_surrogate_in_a_hand_written_neuron_is_replaced():
    jelly = peers.spikingjelly()
    model = nn.Sequential(Holder(jelly.surrogate.Sigmoid(alpha=4.0)), nn.Linear(2, 2))
    assert foreign.unsteered(model) == {"0": "Sigmoid(alpha=4)"}
    chi.prepare(model.eval())
    assert isinstance(model[0].spike, Surrogate)
    assert not model[0].spike.training
    for wrong in (jelly.surrogate.PoissonPass(), jelly.surrogate.ATan(spiking=False)):
        with pytest.raises(ConfigError, match=r"0 \(Holder\): .*(no step function|spiking=False)"):
            chi.prepare(nn.Sequential(Holder(wrong)))


def test_a_model_without_neurons_is_refused():
    with pytest.raises(ConfigError, match="no neurons of SpikingJelly, snnTorch or norse"):
        chi.prepare(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"width": 0}, "width=0 is not allowed; use a number above 0"),
        ({"width": float("nan")}, "width=nan is not allowed"),
        ({"width": "wide"}, "width='wide' is not allowed"),
        ({"shape": "tri"}, "shape='tri' is not allowed; use one of triangle, rectangle"),
        ({"scale": "sum"}, "scale='sum' is not allowed; use one of area, peak"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_changes(settings, said):
    model = nn.Sequential(peers.spikingjelly().neuron.IFNode())
    with pytest.raises(ConfigError, match=f"chi.prepare: {said}"):
        chi.prepare(model, **settings)
    assert list(foreign.unsteered(model)) == ["0"]


def test_what_is_no_module_is_refused():
    with pytest.raises(ConfigError, match=r"model is a list; use a torch\.nn\.Module"):
        chi.prepare([nn.Linear(2, 2)])  # pyright: ignore[reportArgumentType]


class Graded(nn.Module):
    """Spikes of more than one size, as a user may write them."""

    def forward(self, u: Tensor) -> Tensor:
        return u.clamp(0, 3).round()


class Firing(nn.Module):
    def forward(self, u: Tensor) -> Tensor:
        return Triangle.apply(u)  # pyright: ignore[reportReturnType]


def test_a_surrogate_that_is_no_step_or_has_weights_is_refused():
    jelly = peers.spikingjelly()

    class Counting(jelly.surrogate.SurrogateFunctionBase):
        def forward(self, u: Tensor) -> Tensor:
            return u.clamp(0, 3).round()

    learned = jelly.surrogate.ATan(alpha=nn.Parameter(torch.tensor(2.0)))
    for surrogate, said in ((Counting(), "is no step function"), (learned, "keeps alpha in the state dict")):
        with pytest.raises(ConfigError, match=rf"0 \(IFNode\): its surrogate {said}"):
            chi.prepare(nn.Sequential(jelly.neuron.IFNode(surrogate_function=surrogate)))
    node = jelly.neuron.IFNode()
    node._neuron_precision = (torch.float32, "fp32", "fp32")
    with pytest.raises(ConfigError, match="leave the precision out"):
        chi.prepare(nn.Sequential(node))


def test_a_module_as_snntorch_s_spike_grad_is_replaced_too():
    snn = peers.snntorch()
    model = nn.Sequential(snn.Leaky(beta=0.9, spike_grad=Firing()), nn.Linear(2, 2), snn.Leaky(beta=0.9))
    hand_written = nn.Module()
    hand_written.spike_grad = snn.surrogate.atan()  # pyright: ignore
    model.append(hand_written)
    assert list(foreign.unsteered(model)) == ["0", "2", "3"]
    assert list(chi.prepare(model)) == ["0", "2", "3"]
    assert foreign.unsteered(model) == {}
    with pytest.raises(ConfigError, match=r"0 \(Leaky\): its surrogate is no step function"):
        chi.prepare(nn.Sequential(snn.Leaky(beta=0.9, spike_grad=Graded())))


def test_a_layer_of_snntorch_that_emits_no_spikes_is_left_alone():
    silent = peers.snntorch().StateLeaky(beta=0.9, channels=C, output=False)
    with pytest.raises(ConfigError, match="no neurons"):
        chi.prepare(nn.Sequential(silent))


def test_sparse_input_of_a_norse_cell_meets_the_same_surrogate():
    cell = peers.norse().LIFCell(dt=0.01)
    chi.prepare(cell)
    seen: list[Tensor] = []
    cell.activation.surrogate.probe = seen.append
    current = 30 * x()[0]
    dense, sparse = cell(current)[0], cell(current.to_sparse())[0]
    assert torch.equal(sparse.to_dense(), dense)
    assert dense.sum() > 0
    assert len(seen) == 2


def test_a_norse_cell_can_be_compiled():
    cell = peers.norse().LIFCell(dt=0.01)
    chi.prepare(cell)
    gradients = []
    for step in (cell, torch.compile(cell, backend="eager")):
        sequence, state, out = (3 * x()).requires_grad_(), None, []
        for current in sequence:
            spikes, state = step(current, state)
            out.append(spikes)
        (torch.stack(out) * torch.arange(1, 1 + C)).sum().backward()
        gradients.append(sequence.grad)
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


def test_a_backend_with_its_own_kernels_is_refused():
    node = peers.spikingjelly().neuron.IFNode()
    node.backend = "cupy"  # as its versions before 2.0 have it
    with pytest.raises(ConfigError, match=r"0 \(IFNode\): backend 'cupy'.*use backend='torch'"):
        chi.prepare(nn.Sequential(node))


def test_attach_names_the_surrogates_that_are_left_and_those_that_are_shared():
    jelly = peers.spikingjelly()
    model = nn.Sequential(nn.Linear(4, 4), jelly.neuron.IFNode(surrogate_function=chi.Surrogate()), nn.Linear(4, 4),
                          jelly.neuron.IFNode(surrogate_function=jelly.surrogate.ATan()))  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"surrogates of 3 \(ATan\(alpha=2\)\) are not ours.*chi.prepare\(model\)"):
        chi.attach(model, optimizer, steps=5)
    one = chi.Surrogate()
    model = nn.Sequential(nn.Linear(4, 4), Holder(one), nn.Linear(4, 4), Holder(one))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"1, 3 share one chi.Surrogate object.*chi.prepare\(model\)"):
        chi.attach(model, optimizer, steps=5)
    chi.prepare(model)
    assert len(chi.attach(model, optimizer, steps=5).layers) == 2
