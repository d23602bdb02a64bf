"""Every surrogate against its formula, written here a second time, and against the definition of each scale."""

import math

import pytest
import torch

from pipeline.snn import neurons, surrogate
from pipeline.snn.kernels.reference import Rule
from tests.support.snn_twins import new_tally

# With the peak at 1, in forms that share no step with surrogate.py: the logistic function's derivative is
# 1 / (4 cosh^2), and the Cauchy density is w^2 / (w^2 + u^2) times its peak.
PEAK_ONE = {
    "triangle": lambda u, w: max(0.0, (w - abs(u)) / w),
    "rectangle": lambda u, w: 1.0 if -w < u < w else 0.0,
    "atan": lambda u, w: w * w / (w * w + u * u),
    "sigmoid": lambda u, w: 1 / math.cosh(u / (2 * w)) ** 2,
}
AREA = {
    "triangle": lambda w: w,
    "rectangle": lambda w: 2 * w,
    "atan": lambda w: math.pi * w,
    "sigmoid": lambda w: 4 * w,
}
"""Integral of each of them."""
AT_WIDTH = {"triangle": 0.0, "rectangle": 0.0, "atan": 0.5, "sigmoid": 1 / math.cosh(0.5) ** 2}
"""Value of each of them at |u| = w: bounded shapes are 0 there, as the support is open."""

every_surrogate = pytest.mark.parametrize(
    ("shape", "scale"), [(shape, scale) for shape in surrogate.SHAPES for scale in surrogate.SCALES]
)


def formula(u: float, w: float, a: float, shape: str, scale: str) -> float:
    return a * PEAK_ONE[shape](u, w) / (1.0 if scale == "peak" else AREA[shape](w))


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@every_surrogate
@pytest.mark.parametrize(("w", "a"), [(0.7, 1.0), (1.0, 3.0), (0.05, 0.25), (8.0, 2.0)])
def test_every_surrogate_is_its_formula_at_every_point(shape, scale, w, a):
    inside = [w * k / 64 for k in range(-130, 131)]
    points = [*inside, *(sign * w * 10.0**k for k in (1, 2) for sign in (-1, 1))]
    u = torch.tensor(points, dtype=torch.float64)
    g = surrogate.derivative(u, scalar(w), scalar(a), shape=shape, scale=scale)
    for got, point in zip(g.tolist(), points, strict=True):
        # 0.7 * 64 / 64 may round to either side of 0.7, the rectangle's edge; exact widths are tested below.
        if abs(abs(point) - w) > 1e-12:
            assert got == pytest.approx(formula(point, w, a, shape, scale), rel=1e-12, abs=1e-300), point


@every_surrogate
def test_the_centre_and_the_edge_have_their_exact_values(shape, scale):
    # Powers of two: no rounding in any of these, but for pi and the exponential.
    w, a = 0.5, 2.0
    below = math.nextafter(w, 0)
    u = torch.tensor([0.0, w, -w, below, -below], dtype=torch.float64)
    centre, right, left, inside, mirrored = surrogate.derivative(
        u, scalar(w), scalar(a), shape=shape, scale=scale
    ).tolist()
    peak = a if scale == "peak" else a / AREA[shape](w)
    assert centre == pytest.approx(peak, rel=1e-15)
    assert right == pytest.approx(AT_WIDTH[shape] * peak, rel=1e-15)
    assert left == pytest.approx(right, rel=1e-15)
    assert (inside, mirrored) == (pytest.approx(formula(below, w, a, shape, scale), rel=1e-15),) * 2
    assert inside > 0
    covered = surrogate.covered(u, scalar(w)).tolist()
    assert covered == [True, False, False, True, True]


@pytest.mark.parametrize("scale", ["area", "rms"])
@pytest.mark.parametrize("shape", surrogate.SHAPES)
def test_normalised_by_area_a_surrogate_integrates_to_its_amplitude(shape, scale):
    w, a = 0.7, 3.0
    # u = w tan(angle) takes the whole line to an interval. Midpoints of 4 k cells: the edge of the bounded shapes, at
    # a quarter of the circle, lies between two cells.
    cells = 40_000
    angle = (torch.arange(cells, dtype=torch.float64) + 0.5) * (math.pi / cells) - math.pi / 2
    g = surrogate.derivative(w * angle.tan(), scalar(w), scalar(a), shape=shape, scale=scale)
    assert (g * w / angle.cos().square()).sum().item() * math.pi / cells == pytest.approx(a, rel=1e-7)


@every_surrogate
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 4e-7)])
def test_one_step_of_a_neuron_has_the_surrogate_as_its_gradient(shape, scale, dtype, tolerance):
    # Powers of two and small multiples of 1/64: h, u and their distance to the edges are exact, in fp32 as well.
    w, a, v_th, v_reset = 0.5, 3.0, 0.75, -0.25
    neuron = neurons.Neuron(Rule(v_th=v_th, v_reset=v_reset, shape=shape, scale=scale))
    tally = new_tally()
    neuron.attach(torch.tensor(w), torch.tensor(a), tally)
    distances = [k / 64 for k in range(-150, 151)]
    currents = torch.tensor([[u + v_th - v_reset for u in distances]], dtype=dtype, requires_grad=True)
    s = neuron(currents)
    s.sum().backward()
    wanted = [formula(u, w, a, shape, scale) for u in distances]
    assert s.tolist() == [[float(u >= 0) for u in distances]]
    assert currents.grad is not None
    # fp32: the rounding of pi, of the exponential and of four operations.
    assert currents.grad[0].tolist() == pytest.approx(wanted, rel=tolerance, abs=tolerance * a * 1e-3)
    assert tally.spikes.item() == 151
    assert tally.covered.item() == (sum(abs(u) < w for u in distances) if neuron.rule.bounded else 0)
    assert tally.grad_sq.item() == pytest.approx(sum(g * g for g in wanted), rel=10 * tolerance)
