"""Drawn layers of every kind: the form that `dispatch` chooses against the definition; chunks against the whole."""

import dataclasses
import itertools
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.snn import neurons
from pipeline.snn.kernels import compiled, dispatch, reference
from pipeline.snn.kernels.reference import Rule
from tests.support.snn_twins import new_tally, require_compiler

# Every structure with two shapes, and the other shapes once or twice: each kind of neuron takes 2 s to compile.
RULES = [
    Rule(leaky=leaky, hard=hard, detach=detach, shape="triangle" if detach else "rectangle")
    for leaky in (False, True)
    for hard in (True, False)
    for detach in (True, False)
]
RULES += [
    Rule(shape="atan", scale="peak"),
    Rule(shape="sigmoid", scale="peak"),
    Rule(leaky=True, shape="atan", scale="rms"),
    Rule(leaky=True, hard=False, detach=False, shape="sigmoid"),
]
BF16_RULES = [RULES[0], RULES[7]]
EIGHTHS = [-0.5, -0.25, 0.0, 0.125, 0.5]


class Case(NamedTuple):
    """One layer and what flows into it."""

    rule: Rule
    T: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    static: bool
    from_state: bool
    want_state: bool
    width: float
    amplitude: float
    leak: float
    seed: int

    @property
    def exact(self) -> bool:
        """Whether the first step rounds nothing."""
        return math.log2(self.leak).is_integer()


@st.composite
def cases(draw) -> Case:
    dtype = draw(st.sampled_from([torch.float32] * 4 + [torch.bfloat16, torch.bfloat16, torch.float16, torch.float64]))
    rule = draw(st.sampled_from(BF16_RULES if dtype == torch.bfloat16 else RULES))
    rule = dataclasses.replace(
        rule, v_th=draw(st.sampled_from([0.75, 1.0, 1.5])), v_reset=draw(st.sampled_from(EIGHTHS))
    )
    outer = draw(st.lists(st.sampled_from([1, 1, 2, 3, 5, 0]), max_size=3))
    inner = draw(st.lists(st.sampled_from([1, 3, 7, 127, 128, 129, 261]), max_size=1))
    return Case(
        rule=rule,
        T=draw(st.one_of(st.integers(1, 6), st.sampled_from([16, 17, 32, 33, 40]))),
        shape=(*outer, *inner),
        dtype=dtype,
        layout=draw(st.sampled_from(["contiguous", "reversed", "rotated", "sliced", "time inside"])),
        static=draw(st.booleans()),
        from_state=draw(st.booleans()),
        want_state=draw(st.booleans()),
        width=draw(st.sampled_from([0.25, 0.5, 1.0, 1.75])),
        amplitude=draw(st.sampled_from([0.5, 1.0, 1.5])),
        leak=draw(st.sampled_from([1.0, 0.5, 0.25, 0.3])) if rule.leaky else 1.0,
        seed=draw(st.integers(0, 2**20)),
    )


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, other strides."""
    dims = list(range(x.dim()))
    order = {"reversed": [0, *dims[:0:-1]], "rotated": [0, *dims[2:], *dims[1:2]], "time inside": dims[::-1]}.get(
        layout
    )
    if layout == "sliced" and x.dim() > 1:
        return torch.nn.functional.pad(x, (1, 2), value=float("nan"))[..., 1:-2]
    if order is None:
        return x
    inverse = [order.index(dim) for dim in dims]
    return x.permute(order).contiguous().permute(inverse)


def inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Currents, state and the weights of spikes and last state in a loss: multiples of 1/8, exact in every dtype.

    Of the first step's potentials three lie exactly at v_th, v_th + w and v_th - w, where the leak is a power of two.
    """
    generator = torch.Generator().manual_seed(case.seed)

    def eighths(low: int, high: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator) / 8

    rows = 1 if case.static else case.T
    x = eighths(-6, 16, (rows, *case.shape))
    v = eighths(-6, 6, case.shape) if case.from_state else None
    rule, first, before = case.rule, x[0].flatten(), torch.full(case.shape, case.rule.v_reset)
    before = (before if v is None else v).flatten()
    for place, h in enumerate((rule.v_th, rule.v_th + case.width, rule.v_th - case.width)):
        if case.exact and first.numel() > place:
            first[place] = (h - before[place]) / case.leak + (before[place] - rule.v_reset if rule.leaky else 0)
    x[0] = first.view(case.shape)
    return x, v, eighths(-12, 13, (case.T, *case.shape)), eighths(-12, 13, case.shape)


def one_side(case: Case, run, x, v, leak, weight_s, weight_v):
    """Spikes, last state and counters of a layer, and its gradients after `backward`."""
    tally = new_tally()
    width, amplitude = torch.tensor(case.width), torch.tensor(case.amplitude)
    s, state = run(x, case.rule, width, amplitude, leak=leak, v=v, tally=tally)
    loss = (s * weight_s).sum()
    if case.want_state:
        loss = loss + (state * weight_v).sum()
    loss.backward()
    return s, state, tally


def leaf(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(dtype, copy=True).requires_grad_()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=cases())
def check_against_the_definition(case: Case) -> None:
    x, v, weight_s, weight_v = inputs(case)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32

    def chosen(x, rule, width, amplitude, **extra):
        steps = case.T if case.static else None
        return dispatch.run(
            laid_out(x, case.layout), rule, width, amplitude, num_steps=steps, want_state=case.want_state, **extra
        )

    sides = []
    for run, dtype in ((chosen, case.dtype), (reference.run, wide)):
        rows = x if run is chosen else x.expand(case.T, *case.shape)
        x_, v_ = leaf(rows, dtype), leaf(v, wide)
        leak = leaf(torch.tensor(case.leak), wide) if case.rule.leaky else None
        s, state, tally = one_side(case, run, x_, v_, leak, weight_s.to(dtype), weight_v.to(wide))
        assert x_ is not None
        sides.append((s, state, tally, x_.grad, None if v_ is None else v_.grad, None if leak is None else leak.grad))
    (s, state, tally, dx, dv, dleak), (s_, state_, tally_, dx_, dv_, dleak_) = sides

    assert s.dtype == case.dtype
    assert torch.equal(s.to(wide), s_)
    if case.exact:
        assert s[0].flatten()[:3].tolist() == [1, 1, 0][: s[0].numel()]
    if case.want_state:
        assert state.dtype == wide
        assert torch.equal(state, state_)
    else:
        assert state is None
    assert (tally.spikes, tally.covered) == (tally_.spikes, tally_.covered)
    # Positive terms of similar size, at most 64 blocks of T of them in fp32 before doubles: half an ulp each, and some
    # ulp in g itself.
    torch.testing.assert_close(tally.grad_sq, tally_.grad_sq, rtol=(64 * case.T + 8) * 2**-24, atol=0)

    # The same operations, but autograd adds the terms of grad h in another order and divides in the surrogates: some
    # ulp a step, of the largest gradient along the neuron's time, or of a weight times the surrogate's peak.
    largest = dx_.abs().amax(0) + 1.5 * case.amplitude * max(1.0, 1 / case.width)
    ulps = 4 * case.T * torch.finfo(wide).eps
    wanted = dx_.sum(0, keepdim=True) if case.static else dx_
    # A static current's gradient is a sum of T terms; the reference rounds each term, and the sum, to x's dtype.
    rounding = torch.finfo(case.dtype).eps if case.dtype != wide else 0.0
    tolerance = (ulps + rounding) * largest * (case.T if case.static else 1)
    assert bool(((dx.to(wide) - wanted).abs() <= tolerance).all()), (dx.to(wide) - wanted).abs().max()
    if dv is not None:
        assert bool(((dv - dv_).abs() <= ulps * (largest + 1.5) / case.leak).all()), (dv - dv_).abs().max()
    if dleak is not None:
        # A sum over all steps and neurons of grad h times a drive; drives of these currents stay below 16.
        terms = (dx_.abs().sum() / case.leak * 16).item()
        assert dleak.item() == pytest.approx(dleak_.item(), abs=ulps * terms + 1e-30)


def test_a_drawn_layer_agrees_with_the_definition():
    require_compiler()
    check_against_the_definition()


def test_the_draw_reaches_the_twin():
    require_compiler()
    x = torch.zeros(1, 3)
    assert dispatch.choose(x, Rule()) is compiled.Call
    assert dispatch.choose(x.double(), Rule()) is None
    assert dispatch.choose(x.half(), Rule()) is None
    assert dispatch.choose(x[:, :0], Rule()) is None


def test_a_shape_that_the_kernels_do_not_know_runs_by_the_reference(monkeypatch):
    require_compiler()
    x = torch.zeros(1, 3)
    assert dispatch.choose(x, Rule(shape="sigmoid")) is compiled.Call
    monkeypatch.setattr(dispatch, "IN_KERNELS", ("triangle", "rectangle", "atan"))
    assert dispatch.choose(x, Rule(shape="sigmoid")) is None


@pytest.mark.parametrize(
    ("kind", "hard", "dtype"),
    [
        *itertools.product(["if", "lif", "plif"], [True, False], [torch.float32, torch.float64]),
        ("if", True, torch.bfloat16),
    ],
)
def test_chunks_of_a_sequence_are_the_whole(kind, hard, dtype):
    rule = Rule(leaky=kind != "if", hard=hard, v_reset=-0.25)
    x = (3 * torch.randn(9, 2, 67, generator=torch.Generator().manual_seed(2)) + 0.5).to(dtype)
    weight = torch.randn(9, 2, 67, generator=torch.Generator().manual_seed(3)).to(dtype)
    results = []
    for chunks in ((9,), (1, 5, 2, 1)):
        neuron = neurons.Neuron(rule, tau=3.0, learn_tau=kind == "plif")
        tally = new_tally()
        neuron.attach(torch.tensor(0.75), torch.tensor(1.0), tally)
        x_, v, spikes = leaf(x, dtype), None, []
        assert x_ is not None
        for part in x_.split(chunks):
            s, v = neuron.step(part, v)
            spikes.append(s)
        assert v is not None
        s = torch.cat(spikes)
        ((s * weight).sum() + v.sum()).backward()
        results.append((s, v, tally, x_.grad, None if neuron.w is None else neuron.w.grad))
    (s, v, tally, dx, dw), (s_, v_, tally_, dx_, dw_) = results
    assert 0.1 < s.float().mean() < 0.9
    assert torch.equal(s, s_)
    assert torch.equal(v, v_)
    # Potentials and their gradients pass from chunk to chunk in fp32 (fp64): the same bits as within one.
    assert torch.equal(dx, dx_)
    assert (tally.spikes, tally.covered) == (tally_.spikes, tally_.covered)
    torch.testing.assert_close(tally.grad_sq, tally_.grad_sq, rtol=1e-6, atol=0)
    if dw is not None:
        torch.testing.assert_close(dw, dw_, rtol=1e-4, atol=1e-5)


def test_chunks_of_a_current_that_does_not_change_are_the_whole():
    neuron = neurons.Neuron(Rule(hard=False))
    x = torch.randn(1, 130, generator=torch.Generator().manual_seed(2)) + 0.5
    first, v = neuron.step(x, None, num_steps=3)
    second, last = neuron.step(x, v, num_steps=2)
    whole, whole_last = neuron.step(x, None, num_steps=5)
    assert torch.equal(torch.cat([first, second]), whole)
    assert last is not None
    assert whole_last is not None
    assert torch.equal(last, whole_last)
