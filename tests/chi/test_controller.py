"""The controller: its law, its limits, its floors, and that a checkpoint holds its whole state."""

import math

import pytest
import torch

from pipeline.chi.controller import FLOOR_STEP, ControllerState, start, steer, targets_at
from pipeline.chi.policies import Evidence
from pipeline.config import ChiConfig
from pipeline.errors import ConfigError
from tests.chi.chi_engines import WAITS

CPU = torch.device("cpu")


def seen(indicator, coverage=None, rate=None, spread=None) -> Evidence:
    """Evidence of layers that are well above their floors, unless arguments say otherwise."""

    def vector(values):
        return torch.as_tensor(values, dtype=torch.float64)

    indicator = vector(indicator)
    fine = torch.full_like(indicator, 0.5)
    return Evidence(
        indicator=indicator,
        coverage=fine if coverage is None else vector(coverage),
        firing_rate=fine if rate is None else vector(rate),
        spread=None if spread is None else vector(spread),
    )


def held(target: float = 0.4, **settings) -> ChiConfig:
    return ChiConfig(target=target, target_end=target, **{"interval": 1, **settings})


def gaussian(widths, spreads, mean=0.0):
    """Coverage of a Gaussian potential: standard deviation `spreads`, mean `mean` deviations off the threshold."""
    reach = widths.double() / spreads
    normal = torch.distributions.Normal(0.0, 1.0)
    return normal.cdf(reach - mean) - normal.cdf(-reach - mean)


def test_one_decision_is_the_integral_law():
    config = held(eta=0.5, interval=2, indicator="participation")
    state, decision = steer(config, start(torch.full((2,), 1.0)), seen([0.1, 0.9]), 0.0)
    assert state.log_width.tolist() == [0.0, 0.0]
    assert decision is None
    state, decision = steer(config, state, seen([0.3, 0.5]), 0.0)
    # means 0.2 and 0.7, errors 0.2 and -0.3
    assert state.log_width.tolist() == pytest.approx([0.1, -0.15], abs=1e-15)
    assert decision is not None
    assert decision.indicator.tolist() == pytest.approx([0.2, 0.7])
    assert state.count == 0
    assert not state.total.any()


def test_a_decision_on_coverage_goes_eta_of_the_way_where_the_potential_is_a_centred_gaussian():
    spreads = torch.tensor([0.7, 1.0, 1.6], dtype=torch.float64)
    right = 0.5244005127 * spreads  # holds 40 %
    state, _ = steer(held(eta=0.25), start(torch.ones(3)), seen(gaussian(torch.ones(3), spreads)), 0.0)
    assert state.log_width.tolist() == pytest.approx((0.25 * right.log()).tolist(), rel=1e-6)


@pytest.mark.parametrize("off", [8.0, 1 / 8])
def test_a_width_that_is_off_by_a_factor_of_8_is_off_by_9_percent_after_five_decisions(off):
    spread = torch.ones(1, dtype=torch.float64)
    right = 0.5244005127  # holds 40 %
    state = start(torch.tensor([off * right]))
    for _ in range(5):
        state, _ = steer(held(eta=0.5), state, seen(gaussian(state.widths, spread)), 0.0)
    assert abs(state.log_width.item() - math.log(right)) == pytest.approx(math.log(1.09), abs=5e-3)


@pytest.mark.parametrize("mean", [0.0, 1.5])
@pytest.mark.parametrize("width", [0.05, 0.3, 1.0, 8.0])
def test_coverage_reaches_its_target_from_any_start(width, mean):
    spreads = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    state = start(torch.full((3,), width))
    for _ in range(15):
        state, _ = steer(held(), state, seen(gaussian(state.widths, spreads, mean)), 0.0)
    assert gaussian(state.widths, spreads, mean).tolist() == pytest.approx([0.4] * 3, abs=1e-3)


def test_one_decision_at_most_doubles_or_halves_a_width():
    state, _ = steer(held(eta=1.0), start(torch.ones(2)), seen([1e-6, 1 - 1e-6]), 0.0)
    assert state.widths.tolist() == pytest.approx([2.0, 0.5])


def test_no_decision_makes_the_host_wait():
    state, evidence = start(torch.ones(3)), seen([0.1, 0.4, 0.9])
    with torch.profiler.profile() as profile:
        for policy in ("chi", "schedule"):
            steer(held(policy=policy), state, evidence, 0.5)
    assert not {event.key for event in profile.key_averages()} & set(WAITS)


def test_targets_move_linearly_with_the_position_and_the_depth():
    config = ChiConfig(target=0.6, target_end=0.2)
    log_width = torch.zeros(3, dtype=torch.float64)
    assert targets_at(config, 0.25, log_width).tolist() == pytest.approx([0.5] * 3)
    sloped = ChiConfig(target=0.6, target_end=0.4, target_slope=0.2)
    assert targets_at(sloped, 0.0, log_width).tolist() == pytest.approx([0.5, 0.6, 0.7])
    assert targets_at(sloped, 1.0, log_width).tolist() == pytest.approx([0.3, 0.4, 0.5])


def test_a_slope_that_leaves_no_target_for_a_layer_is_refused():
    with pytest.raises(ConfigError, match=r"chi.target_slope=0.7 is not allowed.*chi.target_end=0.3"):
        ChiConfig(target=0.5, target_end=0.3, target_slope=0.7)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_an_indicator_that_is_not_finite_moves_nothing_and_is_forgotten(broken):
    config = held(indicator="participation")
    state, _ = steer(config, start(torch.full((2,), 1.0)), seen([broken, 0.2]), 0.0)
    assert state.log_width.tolist() == pytest.approx([0.0, 0.1])
    unmoved, _ = steer(held(), state, seen([broken, 0.4]), 0.0)
    assert unmoved.log_width.tolist() == state.log_width.tolist()
    state, _ = steer(config, state, seen([0.2, 0.2]), 0.0)
    assert state.log_width.tolist() == pytest.approx([0.1, 0.2])


def test_a_step_without_an_update_does_not_count():
    config = held(interval=2)
    state, _ = steer(config, start(torch.full((1,), 1.0)), seen([0.2]), 0.0)
    assert steer(config, state, None, 0.0) == (state, None)
    state, decision = steer(config, state, seen([0.4]), 0.0)
    assert decision is not None
    assert decision.indicator.tolist() == pytest.approx([0.3])


def test_widths_stay_within_their_limits():
    config = held(0.9, eta=5.0, width_min=0.5, width_max=2.0)
    state = start(torch.full((2,), 1.0))
    for _ in range(10):
        state, _ = steer(config, state, seen([0.0, 1.0]), 0.0)
    assert state.widths.tolist() == pytest.approx([2.0, 0.5])


@pytest.mark.parametrize(("coverage", "rate"), [([0.5, 0.001], None), (None, [0.5, 0.0])])
def test_a_layer_below_a_floor_is_widened_whatever_its_indicator_says(coverage, rate):
    config = held(0.4, indicator="participation")
    state, _ = steer(config, start(torch.full((2,), 1.0)), seen([0.6, 0.6], coverage, rate), 0.0)
    assert state.log_width.tolist() == pytest.approx([-0.1, FLOOR_STEP])
    off = held(0.4, indicator="participation", floor_coverage=0.0, floor_rate=0.0)
    state, _ = steer(off, start(torch.full((2,), 1.0)), seen([0.6, 0.6], coverage, rate), 0.0)
    assert state.log_width.tolist() == pytest.approx([-0.1, -0.1])


def test_the_fixed_policy_moves_nothing():
    state, decision = steer(ChiConfig(policy="fixed", interval=1), start(torch.full((2,), 0.7)), seen([0.0, 1.0]), 0.5)
    assert state.widths.tolist() == pytest.approx([0.7, 0.7])
    assert decision is None


def test_the_schedule_goes_from_the_first_width_to_the_last_on_a_straight_line_in_the_logarithm():
    config = ChiConfig(policy="schedule", width_end=0.5, interval=1)
    state = start(torch.full((2,), 2.0))
    for progress, width in ((0.25, 2**0.5), (0.5, 1.0), (1.0, 0.5)):
        state, _ = steer(config, state, seen([0.1, 0.9]), progress)
        assert state.widths.tolist() == pytest.approx([width] * 2)
    each, _ = steer(config, start(torch.tensor([2.0, 0.125])), seen([0.1, 0.9]), 0.5)
    assert each.widths.tolist() == pytest.approx([1.0, 0.25]), "every layer from its own first width"


def test_the_rivals_take_the_width_from_the_spread_of_the_potential():
    state, _ = steer(
        ChiConfig(policy="mpd_agl", interval=1), start(torch.full((2,), 1.0)), seen([0, 0], spread=[1.4, 0.3]), 0.0
    )
    assert state.widths.tolist() == pytest.approx([1.4, 0.3])
    state, _ = steer(
        ChiConfig(policy="ds_atgo", interval=1), start(torch.full((2,), 1.0)), seen([0, 0], spread=[2.0, 0.5]), 0.0
    )
    assert state.widths.tolist() == pytest.approx([1.1, 0.95])
    state, _ = steer(ChiConfig(policy="mpd_agl", interval=1), state, seen([0, 0], spread=[0.0, math.nan]), 0.0)
    assert state.widths.tolist() == pytest.approx([1.1, 0.95]), "a width of 0 or NaN is not taken"


def test_a_saved_state_goes_on_bit_for_bit():
    config = ChiConfig(target=0.4, target_end=0.3, interval=3)
    readings = torch.rand(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    straight = resumed = start(torch.tensor([0.5, 1.0, 2.0, 4.0]))
    for step, reading in enumerate(readings):
        straight, _ = steer(config, straight, seen(reading), step / 20)
        resumed, _ = steer(config, resumed, seen(reading), step / 20)
        resumed = ControllerState.from_state_dict(resumed.state_dict(), CPU)
    assert torch.equal(straight.log_width, resumed.log_width)
    assert torch.equal(straight.total, resumed.total)
    assert torch.equal(straight.start, resumed.start)
    assert straight.count == resumed.count
