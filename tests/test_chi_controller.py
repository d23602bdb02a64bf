"""The controller: the law it claims, its limits, and that it forgets nothing in a checkpoint."""

import math

import pytest
import torch

from pipeline.chi.controller import ControllerState, start, steer, target_at
from pipeline.config import ChiConfig

CPU = torch.device("cpu")


def gaussian_coverage(width: torch.Tensor, spread: float) -> torch.Tensor:
    """Share of a centred Gaussian potential of standard deviation `spread` within `width` of the threshold."""
    return torch.erf(width.double() / (spread * math.sqrt(2)))


def test_one_decision_is_the_integral_law():
    config = ChiConfig(target=0.4, target_end=0.4, eta=0.5, interval=2)
    state = start(2, 1.0, CPU)
    state = steer(config, state, torch.tensor([0.1, 0.9], dtype=torch.float64), 0.0)
    assert state.log_width.tolist() == [0.0, 0.0]
    state = steer(config, state, torch.tensor([0.3, 0.5], dtype=torch.float64), 0.0)
    # means 0.2 and 0.7, errors 0.2 and -0.3
    assert state.log_width.tolist() == pytest.approx([0.1, -0.15], abs=1e-15)
    assert state.count == 0
    assert state.total.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("width", [0.05, 0.3, 1.0, 8.0])
def test_coverage_reaches_its_target_from_any_start(width):
    config = ChiConfig(target=0.4, target_end=0.4, interval=1)
    spreads = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    state = start(3, width, CPU)
    for _ in range(60):
        state = steer(config, state, torch.erf(state.widths.double() / (spreads * math.sqrt(2))), 0.0)
    reached = torch.erf(state.widths.double() / (spreads * math.sqrt(2)))
    assert reached.tolist() == pytest.approx([0.4] * 3, abs=1e-3)


def test_target_moves_linearly_with_the_position():
    config = ChiConfig(target=0.6, target_end=0.2)
    assert [target_at(config, p) for p in (0.0, 0.25, 1.0)] == pytest.approx([0.6, 0.5, 0.2])


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_an_indicator_that_is_not_finite_moves_nothing_and_is_forgotten(broken):
    config = ChiConfig(target=0.4, target_end=0.4, interval=1)
    state = steer(config, start(2, 1.0, CPU), torch.tensor([broken, 0.2], dtype=torch.float64), 0.0)
    assert state.log_width.tolist() == pytest.approx([0.0, 0.1])
    state = steer(config, state, torch.tensor([0.2, 0.2], dtype=torch.float64), 0.0)
    assert state.log_width.tolist() == pytest.approx([0.1, 0.2])


def test_widths_stay_within_their_limits():
    config = ChiConfig(target=0.9, target_end=0.9, interval=1, eta=5.0, width_min=0.5, width_max=2.0)
    state = start(2, 1.0, CPU)
    for _ in range(10):
        state = steer(config, state, torch.tensor([0.0, 1.0], dtype=torch.float64), 0.0)
    assert state.widths.tolist() == pytest.approx([2.0, 0.5])


def test_the_fixed_policy_moves_nothing():
    config = ChiConfig(policy="fixed", interval=1)
    state = start(2, 0.7, CPU)
    assert steer(config, state, torch.tensor([0.0, 1.0], dtype=torch.float64), 0.5) == state


def test_a_saved_state_goes_on_bit_for_bit():
    config = ChiConfig(target=0.4, target_end=0.3, interval=3)
    readings = torch.rand(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    straight = resumed = start(4, 0.8, CPU)
    for step, reading in enumerate(readings):
        straight = steer(config, straight, reading, step / 20)
        resumed = ControllerState.from_dict(steer(config, resumed, reading, step / 20).to_dict(), CPU)
    assert torch.equal(straight.log_width, resumed.log_width)
    assert torch.equal(straight.total, resumed.total)
    assert straight.count == resumed.count
