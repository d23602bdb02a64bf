"""docs/network_psn.py: its neurons are SpikingJelly's, in fp64, and their surrogate is steered and counted as any."""

import runpy
from typing import Any

import pytest
import torch

from pipeline.config import ModelConfig
from pipeline.snn.neurons import bind
from tests.conftest import ROOT
from tests.support import peers

T, K = 5, 3
EXAMPLE = runpy.run_path(str(ROOT / "docs/network_psn.py"))


def made(kind: str, shape: str = "triangle") -> Any:
    """Neurons with weights and thresholds that differ from the first ones."""
    model = ModelConfig(T=T, surrogate=shape, v_th=0.5)
    psn = EXAMPLE["PSN"](model) if kind == "PSN" else EXAMPLE["SlidingPSN"](model, K)
    generator = torch.Generator().manual_seed(1)
    for parameter in psn.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return psn.double()


def currents() -> torch.Tensor:
    return torch.randn(T, 2, 3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("kind", ["PSN", "SlidingPSN"])
@pytest.mark.parametrize("shape", ["triangle", "atan"])
def test_spikes_and_gradients_are_those_of_spikingjelly(kind, shape):
    width = 0.75  # as if it had been steered there
    jelly, make = peers.spikingjelly(), {"triangle": "PiecewiseQuadratic", "atan": "ATan"}[shape]
    g = getattr(jelly.surrogate, make)({"triangle": 1 / width, "atan": 2 / (torch.pi * width)}[shape])
    if kind == "PSN":
        theirs = jelly.neuron.PSN(T, surrogate_function=g)
    else:
        theirs = jelly.neuron.SlidingPSN(K, surrogate_function=g, step_mode="m")
    ours = made(kind, shape)
    bind(ours).widths.fill_(width)
    theirs.double().load_state_dict(
        {name: value.view(()) if value.numel() == 1 else value for name, value in ours.state_dict().items()}
    )
    x, y = currents(), currents()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    s, expected = ours(x), theirs(y)
    assert torch.equal(s, expected)
    assert 0.1 < s.mean() < 0.9
    (s * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad.view_as(other), other.grad, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", ["PSN", "SlidingPSN"])
def test_neurons_start_as_spikingjelly_s(kind):
    jelly, model = peers.spikingjelly(), ModelConfig(T=T)
    torch.manual_seed(0)
    theirs = jelly.neuron.PSN(T) if kind == "PSN" else jelly.neuron.SlidingPSN(K)
    torch.manual_seed(0)
    ours = EXAMPLE["PSN"](model) if kind == "PSN" else EXAMPLE["SlidingPSN"](model, K)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one.view_as(other), other)


@pytest.mark.parametrize("kind", ["PSN", "SlidingPSN"])
def test_a_layer_counts_its_spikes_and_its_coverage_at_the_width_that_it_has(kind):
    psn = made(kind)
    state, x = bind(psn), currents()
    potentials = []
    psn.surrogate.probe = potentials.append
    s = psn(x)
    (h,) = potentials
    for width in (0.4, 1.2):
        state.widths.fill_(width)
        state.zero_counts()
        psn(x).sum().backward()
        assert state.names == ("surrogate",)
        assert state.neuron_steps.item() == x.numel()
        assert state.spikes.item() == s.sum()
        assert state.covered.item() == (h.abs() < width).sum()


def test_a_sliding_neuron_sees_its_last_steps_alone_and_any_number_of_them():
    psn, x = made("SlidingPSN"), currents()
    h = []
    psn.surrogate.probe = h.append
    psn(x)
    psn(x[:2])  # fewer than it has weights
    weight, bias = psn.weight, psn.bias
    last = weight[0] * x[2] + weight[1] * x[3] + weight[2] * x[4] + bias
    torch.testing.assert_close(h[0][4], last.float())
    torch.testing.assert_close(h[1][1], (weight[1] * x[0] + weight[2] * x[1] + bias).float())
