"""The definition against values derived by hand, and every twin of it against the definition."""

import dataclasses
import itertools

import pytest
import torch

from pipeline.snn import neurons
from pipeline.snn.kernels import compiled, dispatch, reference
from pipeline.snn.kernels.reference import Rule
from tests.support.snn_twins import new_tally

ONE = torch.ones((), dtype=torch.float64)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


# Currents are sums of powers of two, so every value below is exact. v_th = 1, triangle of width 1, area 1:
# g(u) = 1 - |u| for |u| < 1. Worked by hand from the equations in the docstring of reference.py.
BY_HAND = {
    # h = 0.5, 1 (at v_th: fires), 0.75, 1.25; v = 0.5, 0, 0.75, 0
    "if-hard": (Rule(), None, (0.5, 0.5, 0.75, 0.5), (0, 1, 0, 1), 0.0),
    # h = 0.5, 1.25, 1.0, 0.5; v = 0.5, 0.25, 0, 0.5
    "if-soft": (Rule(hard=False), None, (0.5, 0.75, 0.75, 0.5), (0, 1, 1, 0), 0.5),
    # leak 1/2, h = v + (x - v)/2 = (v + x)/2: 1 (fires), 0.5, 1.25 (fires), 0.25; v = 0, 0.5, 0, 0.25
    "lif-hard": (Rule(leaky=True), 0.5, (2.0, 1.0, 2.0, 0.5), (1, 0, 1, 0), 0.25),
    # h = 1.5 (fires), 0.75, 1.375 (fires), 0.1875; v = 0.5, 0.75, 0.375, 0.1875
    "lif-soft": (Rule(leaky=True, hard=False), 0.5, (3.0, 1.0, 2.0, 0.0), (1, 0, 1, 0), 0.1875),
}
# grad s = 1 at every step. grad h[t] = g[t] + grad v[t] keep[t]; grad v[t-1] = grad h[t] (1 - leak) for leaky rules.
GRADIENTS = {
    # g = 0.5, 1, 0.75, 0.75; keep = 1, 0, 1, 0
    "if-hard": (1.5, 1.0, 1.5, 0.75),
    # g = 0.5, 0.75, 1, 0.5; keep = 1
    "if-soft": (2.75, 2.25, 1.5, 0.5),
    # g = 1, 0.5, 0.75, 0.25; keep = 0, 1, 0, 1; grad h = 1, 0.5 + 0.375, 0.75, 0.25; grad x = half of it
    "lif-hard": (0.5, 0.4375, 0.375, 0.125),
    # g = 0.5, 0.75, 0.625, 0.1875; keep = 1; grad h = 1.0546875, 1.109375, 0.71875, 0.1875; grad x = half of it
    "lif-soft": (0.52734375, 0.5546875, 0.359375, 0.09375),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_four_steps_match_the_derivation_by_hand(name):
    rule, leak, currents, spikes, last = BY_HAND[name]
    x = column(*currents).requires_grad_()
    tally = new_tally()
    leak_tensor = None if leak is None else torch.tensor(leak, dtype=torch.float64)
    s, v = reference.run(x, rule, ONE, ONE, leak=leak_tensor, tally=tally)
    s.sum().backward()
    assert x.grad is not None
    assert s.flatten().tolist() == list(spikes)
    assert v.item() == last
    assert x.grad.flatten().tolist() == list(GRADIENTS[name])
    assert tally.spikes.item() == sum(spikes)
    assert tally.covered.item() == 4


@pytest.mark.parametrize(
    ("hard", "expected"),
    # h = 1.25, g = 0.75, grad v = 1. Hard: dv/dh = 1 - s - h g = -0.9375; soft: dv/dh = 1 - g = 0.25.
    [(True, 0.75 - 0.9375), (False, 0.75 + 0.25)],
)
def test_a_reset_that_is_not_detached_passes_gradient_through_the_spike(hard, expected):
    x = column(1.25).requires_grad_()
    s, v = reference.run(x, Rule(hard=hard, detach=False), ONE, ONE)
    (s.sum() + v.sum()).backward()
    assert x.grad is not None
    assert x.grad.item() == expected


@pytest.mark.parametrize("leaky", [False, True])
def test_a_single_step_fires_at_the_threshold_and_not_below(leaky):
    leak = torch.tensor(1.0, dtype=torch.float64) if leaky else None
    below = torch.nextafter(ONE, torch.zeros_like(ONE)).item()
    x = torch.tensor([[1.0, below, 2.0, -1.0]], dtype=torch.float64, requires_grad=True)
    s, _ = reference.run(x, Rule(leaky=leaky), ONE, ONE, leak=leak)
    s.sum().backward()
    assert x.grad is not None
    assert s.tolist() == [[1, 0, 1, 0]]
    assert x.grad[0, 0] == 1
    assert x.grad[0, 2:].tolist() == [0, 0]


RULES = [
    Rule(leaky=leaky, hard=hard, detach=detach, v_th=v_th, v_reset=v_reset, shape=shape)
    for (leaky, hard), (detach, v_th, v_reset, shape) in itertools.product(
        [(False, True), (False, False), (True, True), (True, False)],
        [(True, 1.0, 0.0, "triangle"), (False, 0.75, -0.25, "rectangle")],
    )
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{'lif' if rule.leaky else 'if'}-{rule.hard}-{rule.shape}")
def test_the_compiled_twin_gives_the_reference_bits(rule):
    generator = torch.Generator().manual_seed(5)
    # Multiples of 1/8 put many potentials exactly at v_th = 1 and 0.75.
    x = torch.randint(-4, 12, (4, 3, 5, 7, 3), generator=generator) / 8
    v0 = torch.randint(-4, 6, (3, 5, 7, 3), generator=generator) / 8
    weight_s, weight_v = (torch.randn(y.shape, generator=generator) for y in (x, v0))
    width, amplitude = torch.tensor(0.5), torch.tensor(1.5)
    results = []
    for run in (reference.run, dispatch.run):
        x_, v_ = x.clone().requires_grad_(), v0.clone().requires_grad_()
        leak = torch.tensor(0.5, requires_grad=True) if rule.leaky else None
        extra: dict = {"want_state": True} if run is dispatch.run else {}
        tally = new_tally()
        s, v = run(x_, rule, width, amplitude, leak=leak, v=v_, tally=tally, **extra)
        assert v is not None
        ((s * weight_s).sum() + (v * weight_v).sum()).backward()
        results.append((s, v, x_.grad, v_.grad, None if leak is None else leak.grad, tally))
    if compiled.why_not():
        pytest.skip(f"compiling does not work here: {compiled.why_not()}")
    (s, v, dx, dv, dleak, tally), (s_, v_out, dx_, dv_, dleak_, tally_) = results
    assert torch.equal(s, s_)
    assert torch.equal(v, v_out)
    assert (tally.spikes, tally.covered) == (tally_.spikes, tally_.covered)
    assert 0 < tally.covered < x.numel()
    # The same operations on the same bits, but autograd adds the two terms of grad h in another order: 1 ulp a step.
    torch.testing.assert_close(dx_, dx, rtol=4 * 2**-23, atol=4 * 2**-23)
    torch.testing.assert_close(dv_, dv, rtol=4 * 2**-23, atol=4 * 2**-23)
    # One sum over all elements in another order: sqrt(n) eps of the terms' size, n = 1260.
    torch.testing.assert_close(tally_.grad_sq, tally.grad_sq, rtol=1e-5, atol=0)
    if dleak is not None:
        torch.testing.assert_close(dleak_, dleak, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "static"])
def test_memory_layouts_and_dtypes_do_not_change_a_spike(layout, dtype):
    x = torch.randn(4, 2, 6, 5, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    steps = None
    if layout == "channels_last":
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (4, 2))
    elif layout == "strided":
        x = torch.nn.functional.pad(x, (1, 2), value=float("nan"))[..., 1:-2]
    elif layout == "static":
        x, steps = x[:1], 4
    grads = []
    for run in (dispatch.run, reference.run):
        x_ = x.detach().requires_grad_()
        full = x_.expand(4, *x.shape[1:]) if steps and run is reference.run else x_
        extra = {"num_steps": steps, "want_state": True} if run is dispatch.run else {}
        s, v = run(full, Rule(), torch.tensor(1.0), torch.tensor(1.0), **extra)
        assert v is not None
        s.float().square().sum().backward()
        assert s.dtype == dtype
        assert v.dtype == torch.float32
        grads.append((s, v, x_.grad))
    (s, v, dx), (s_, v_, dx_) = grads
    assert torch.equal(s, s_)
    assert torch.equal(v, v_)
    # A static current sums T gradients, in fp32 in the twin and rounded to x's dtype in autograd: eps of the dtype.
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(dx, dx_, rtol=tolerance, atol=tolerance)


def test_bound_widths_are_read_from_memory_and_counts_are_added_there():
    net = torch.nn.Sequential(neurons.Neuron(Rule(), width=0.5), neurons.Neuron(Rule(shape="atan"), width=2.0))
    state = neurons.bind(net)
    assert state.widths.tolist() == [0.5, 2.0]
    x = torch.tensor([[0.75], [2.0]], requires_grad=True)
    net(x).sum().backward()
    assert x.grad is not None
    # First layer: h = 0.75 (|u| = 0.25 < 0.5), 2.75 (|u| = 1.75); second layer gets 0, 1 and fires once.
    assert state.spikes.tolist() == [1, 1]
    assert state.covered.tolist() == [1, 0]
    assert state.neuron_steps.tolist() == [2, 2]
    narrow = x.grad.clone()
    state.widths[0] = 0.125
    x.grad = None
    net(x).sum().backward()
    assert state.covered[0] == 1
    assert x.grad is not None
    assert not torch.equal(narrow, x.grad)
    state.zero_counts()
    assert (state.spikes.sum(), state.covered.sum(), state.grad_sq.sum()) == (0, 0, 0)
    net.eval()
    with torch.no_grad():
        net(x)
    assert state.spikes.tolist() == [0, 0], "an evaluation is not counted"
    assert "widths" not in str(net.state_dict())


def test_chunks_of_a_sequence_give_the_spikes_of_the_whole():
    neuron = neurons.Neuron(Rule(leaky=True), tau=3.0)
    x = torch.randn(7, 11, generator=torch.Generator().manual_seed(2)) + 0.5
    first, v = neuron.step(x[:3], None)
    second, _ = neuron.step(x[3:], v)
    assert torch.equal(torch.cat([first, second]), neuron(x))


def test_an_empty_batch_gives_an_empty_result():
    s, _ = dispatch.run(torch.zeros(4, 0, 3), Rule(), torch.tensor(1.0), torch.tensor(1.0), tally=new_tally())
    assert s.shape == (4, 0, 3)


def test_an_unknown_surrogate_is_refused_by_name():
    with pytest.raises(ValueError, match=r"model\.surrogate='box' is not allowed; use one of triangle"):
        neurons.Neuron(dataclasses.replace(Rule(), shape="box"))
