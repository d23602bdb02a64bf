"""`chi.attach` and torch.compile: the numbers of the same script without it, in one graph, compiled once."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional

from pipeline import chi
from pipeline.errors import ConfigError
from tests.chi.attach_nets import KINDS, Net

MICRO_BATCHES = 12


def ordered(kind: str) -> Net:
    """The net with its modules registered in forward order: a compiled pass does not show which weights feed what."""
    torch.manual_seed(1)
    net = Net(kind)
    for name in ("a", "norm", "first", "b", "second", "c"):
        net._modules[name] = net._modules.pop(name)
    return net


def train(kind: str, backend: str | None, *, steps: int = 3, fullgraph: bool = False, attached: str = "model"):
    """The pilot and the graphs that were made, after steps of micro-batches of changing sizes."""
    torch._dynamo.reset()
    counters.clear()
    net = ordered(kind)
    model: nn.Module = torch.compile(net, backend=backend, fullgraph=fullgraph) if backend else net  # pyright: ignore
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pilot = chi.attach(model if attached == "model" else net, optimizer, target_end=0.5, interval=1)
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(MICRO_BATCHES):
            generator = torch.Generator().manual_seed(100 * step + part)
            size = 8 + part % 3
            x, y = torch.randn(size, 32, generator=generator), torch.randint(5, (size,), generator=generator)
            functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return pilot, counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("kind", ["ours", "hand-written", "snntorch"])
def test_a_compiled_model_is_measured_and_not_compiled_again(kind):
    expected, _ = train(kind, None)
    for attached in ("model", "inside"):
        pilot, graphs = train(kind, "aot_eager", fullgraph=True, attached=attached)
        assert graphs <= 2  # one with the first batch's size, and one for any size
        assert pilot.indicators is not None
        assert expected.indicators is not None
        for name, values in expected.indicators.to_lists().items():
            assert getattr(pilot.indicators, name).tolist() == pytest.approx(values, rel=1e-5), name
        assert pilot.neurons.widths.tolist() == pytest.approx(expected.neurons.widths.tolist(), rel=1e-5)
        assert pilot.neurons.widths.unique().numel() == 2


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_inductor_gives_the_same_counts(kind):
    expected, _ = train(kind, None)
    pilot, graphs = train(kind, "inductor")
    assert pilot.indicators is not None
    assert expected.indicators is not None
    assert graphs <= (2 if "spikingjelly" not in kind else 16)  # which breaks the graph in its own forward
    for name, values in expected.indicators.to_lists().items():
        assert getattr(pilot.indicators, name).tolist() == pytest.approx(values, rel=0.02), name


def test_weights_that_a_compiled_pass_hides_are_not_guessed():
    torch._dynamo.reset()
    net = Net("ours")  # both neurons are registered after all linear layers
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    model = torch.compile(net, backend="aot_eager")
    chi.attach(model, optimizer, policy="fixed")  # pyright: ignore
    model(torch.randn(4, 32)).sum().backward()
    with pytest.raises(ConfigError, match=r"which weights feed first and second.*register modules in forward order"):
        optimizer.step()


def test_a_policy_that_looks_into_the_neurons_is_refused_in_a_compiled_model():
    torch._dynamo.reset()
    net = ordered("ours")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    model = torch.compile(net, backend="aot_eager")
    chi.attach(model, optimizer, policy="ds_atgo", interval=100)  # pyright: ignore
    model(torch.randn(4, 32)).sum().backward()
    with pytest.raises(ConfigError, match=r"ds_atgo looks into the neurons.*use another policy"):
        optimizer.step()
