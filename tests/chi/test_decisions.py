"""Decisions read from the journal: replay, starving layers, layers that do not respond."""

import json
import math

import pytest
import torch

from pipeline.chi.controller import start, steer
from pipeline.chi.decisions import findings, record_of, replay
from pipeline.chi.policies import Evidence
from pipeline.chi.widths import Decision
from pipeline.config import ChiConfig


def journal_of(config: ChiConfig, state, evidence, num_steps: int) -> list[dict]:
    """The records of a run whose evidence is `evidence(widths)`, as read back from metrics.jsonl."""
    records = [{"step": 0, "decision_log_width": state.log_width.tolist()}]
    for step in range(1, num_steps + 1):
        progress = step / num_steps
        state, decision = steer(config, state, evidence(state.widths.double()), progress)
        if decision is not None:
            records.append({"step": step, **record_of(Decision(decision, state.log_width, progress))})
        records.append({"step": step, "train_loss": 1.0})
    return json.loads(json.dumps(records, allow_nan=True).replace("NaN", "null"))


def gaussian(widths: torch.Tensor) -> Evidence:
    coverage = torch.erf(widths / math.sqrt(2))
    return Evidence(indicator=coverage, coverage=coverage, firing_rate=torch.full_like(coverage, 0.2))


@pytest.mark.parametrize("policy", ["chi", "schedule", "ds_atgo"])
def test_every_decision_is_made_again_bit_for_bit(policy):
    config = ChiConfig(policy=policy, interval=3, target_slope=0.1)

    def evidence(widths):
        seen = gaussian(widths)
        return Evidence(
            indicator=seen.indicator, coverage=seen.coverage, firing_rate=seen.firing_rate, spread=widths.sqrt()
        )

    begun = start(torch.tensor([0.3, 1.0, 3.0]))
    steps = replay(config, journal_of(config, begun, evidence, 40))
    assert [step for step, _, _ in steps] == list(range(3, 40, 3))
    assert all(recorded == again for _, recorded, again in steps)
    other = ChiConfig(policy=policy, interval=3, target_slope=0.1, target=0.6, width_end=0.3)
    if policy != "ds_atgo":
        again = replay(other, journal_of(config, begun, evidence, 40))
        assert all(recorded != made for _, recorded, made in again)


def test_nothing_is_found_where_all_is_well():
    config = ChiConfig(interval=1)
    assert findings(config, ["a", "b"], journal_of(config, start(torch.full((2,), 1.0)), gaussian, 60)) == []
    assert findings(config, ["a", "b"], []) == []


def test_a_layer_that_starved_and_came_back_is_named_with_the_step():
    def evidence(widths):
        coverage = torch.erf(widths / torch.tensor([1.0, 20.0]) / math.sqrt(2))
        rate = torch.full_like(widths, 0.2)
        return Evidence(indicator=torch.erf(widths / math.sqrt(2)), coverage=coverage, firing_rate=rate)

    config = ChiConfig(interval=1, indicator="participation")
    begun = start(torch.tensor([1.0, 0.05]))
    found = findings(config, ["first", "second"], journal_of(config, begun, evidence, 60))
    # The second layer reaches coverage 0.01 at width 0.25: eight decisions of a quarter each, from 0.05.
    assert found == ["second: fell below its floor, was widened, and is above it since step 8"]


def test_a_silent_layer_and_one_that_does_not_answer_are_named():
    config = ChiConfig(interval=1, target=0.6, target_end=0.6)

    def evidence(widths):
        deaf = torch.tensor([0.3, 0.5], dtype=torch.float64)
        return Evidence(
            indicator=deaf, coverage=gaussian(widths).coverage, firing_rate=torch.tensor([0.2, 0.0]).double()
        )

    found = findings(config, ["deaf", "silent"], journal_of(config, start(torch.full((2,), 0.1)), evidence, 25))
    assert any(line.startswith("deaf: its width moved by a factor of ") for line in found)
    assert any(line.startswith("silent: below its floor in 25 of 25 decisions") for line in found)


def test_a_layer_at_a_limit_is_named():
    config = ChiConfig(interval=1, target=0.6, target_end=0.6, width_max=1.0)

    def evidence(widths):
        low = torch.full_like(widths, 0.3)
        return Evidence(indicator=low, coverage=low, firing_rate=low)

    found = findings(config, ["wide"], journal_of(config, start(torch.full((1,), 1.0)), evidence, 30))
    assert found == ["wide: at the widest width allowed, 1, for 20 decisions"]
