"""χ in the all-reduce is exact and costs next to nothing: real ranks, gradients with known zeros."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.chi.limbs import MAX_RANKS, pack, unpack
from tests.conftest import launch

STAGES, LAYERS = (0, 1, 2, 3), 2
CASES = list(itertools.product(STAGES, ("fp32", "bf16"), (1, 2)))


@pytest.fixture(scope="module")
def output() -> str:
    done = launch("tests/chi_matrix.py", ranks=2)
    assert done.returncode == 0, done.output
    return done.output


def lines(output: str, kind: str) -> list:
    return [json.loads(line.split(kind + " ", 1)[1]) for line in output.splitlines() if kind + " " in line]


@pytest.fixture(scope="module")
def matrix(output) -> dict:
    return {(r["stage"], r["precision"], r["accumulation"]): r for r in lines(output, "CASE")}


@pytest.mark.parametrize("case", CASES)
def test_chi_equals_a_plain_count_and_deepspeeds_full_gradient(matrix, case):
    for step in matrix[case]["steps"]:
        for source in ("full", "plain"):
            assert step["chi"] == step[source]["chi"], source
            assert step["network_chi"] == step[source]["network_chi"]
            assert step["participation"] == pytest.approx(step[source]["participation"], rel=1e-6)
        for chi in [*step["chi"], step["network_chi"]]:
            assert 0 < chi < 1
        # A third of the first layer's inputs is silent, and a third of its outputs is dead.
        assert step["chi"][0] <= 4 / 9
        assert step["chi"][1] <= 4 / 6


@pytest.mark.parametrize("case", CASES)
def test_the_tap_adds_no_collective_or_a_small_one_and_few_bytes(matrix, case):
    result = matrix[case]
    assert result["calls_without"] > 0
    in_bucket = case[0] <= 1
    assert result["calls_with"] == result["calls_without"] + (0 if in_bucket else 1)
    # Per layer two integers of 12 bytes in a bucket, else five float64; and what is sent once.
    assert result["extra_bytes"] == (24 * LAYERS + 40 if in_bucket else 40 * LAYERS + 48)


@pytest.mark.parametrize("case", CASES)
def test_rates_and_signals_are_summed_over_ranks(matrix, case):
    for step in matrix[case]["steps"]:
        assert step["bad_samples"] == 1 + 2
        assert all(0 < rate < 1 for rate in step["firing_rate"])
        assert all(0 < coverage < 1 for coverage in step["coverage"])


def test_the_same_gradient_in_more_micro_batches_counts_the_same_neuron_steps(matrix):
    for stage in STAGES:
        for name in ("chi", "firing_rate", "coverage"):
            one, other = (matrix[(stage, "fp32", a)]["steps"][0][name] for a in (1, 2))
            assert one == pytest.approx(other, abs=0.2)


def test_zero_stages_agree(matrix):
    for precision, accumulation in itertools.product(("fp32", "bf16"), (1, 2)):
        zero, *others = (matrix[(stage, precision, accumulation)]["steps"][0] for stage in STAGES)
        for other in others:
            assert zero["chi"] == other["chi"]
            assert zero["coverage"] == other["coverage"]
            assert zero["firing_rate"] == other["firing_rate"]


def test_no_rank_updates_from_a_gradient_that_is_nan_or_was_miscounted(output):
    ranks = list(itertools.chain.from_iterable(lines(output, "GUARD")))
    assert [rank["stage"] for rank in ranks] == [0, 0, 1, 1, 2, 2, 3, 3]
    for rank in ranks:
        assert rank["nan"].startswith("NonFiniteError: the gradient ")
        assert "conv1.weight has" in rank["miscounted"]
        assert rank["nan left the weights alone"]
        assert rank["miscounted left the weights alone"]


def test_a_checkpoint_goes_back_into_every_stage_bit_for_bit(output):
    assert lines(output, "RESUME") == [{"stage": stage, "same": True} for stage in STAGES]


@given(st.lists(st.integers(0, 2**36 - 1), min_size=1, max_size=8), st.integers(1, MAX_RANKS))
def test_packed_counts_survive_a_sum_and_an_average_over_ranks(counts, ranks):
    limbs = pack(torch.tensor(counts))
    expected = [count * ranks for count in counts]
    assert unpack(limbs * ranks).tolist() == expected
    averaged = torch.zeros_like(limbs)
    for _ in range(min(ranks, 50)):
        averaged += limbs / ranks
    averaged += limbs / ranks * (ranks - min(ranks, 50))
    assert unpack(averaged * ranks).tolist() == expected
