"""χ in the all-reduce is exact and costs next to nothing: real ranks, gradients with known zeros."""

import itertools
import subprocess
import sys

import pytest
import torch

from pipeline.errors import EXIT_USAGE
from tests.conftest import ROOT, launch
from tests.support.rank_lines import told

CLIP = 0.01  # of chi_matrix.py

STAGES, LAYERS = (0, 1, 2, 3), 2
PRECISIONS = (("fp32", 1), ("fp32", 2), ("bf16", 2), ("fp16", 2))  # with accumulation; fp16 is slow here
CASES = [(stage, *precision) for stage in STAGES for precision in PRECISIONS]
# The plain count and DeepSpeed sum fp16 gradients in different orders.
ROUNDING = {"fp32": 1e-6, "bf16": 1e-6, "fp16": 1e-3}


@pytest.fixture(scope="module")
def output() -> str:
    done = launch("tests/chi/chi_matrix.py", ranks=2)
    assert done.returncode == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def matrix(output) -> dict:
    return {(r["stage"], r["precision"], r["accumulation"]): r for r in told(output, "CASE")}


def assert_exact(result: dict) -> None:
    for step in result["steps"]:
        for source in ("full", "plain"):
            assert step["chi"] == step[source]["chi"], source
            assert step["network_chi"] == step[source]["network_chi"]
            rounding = 1e-6 if source == "full" else ROUNDING[result["precision"]]
            assert step["participation"] == pytest.approx(step[source]["participation"], rel=rounding)


@pytest.mark.parametrize("case", CASES)
def test_chi_equals_a_plain_count_and_deepspeeds_full_gradient(matrix, case):
    assert_exact(matrix[case])
    for step in matrix[case]["steps"]:
        for chi in [*step["chi"], step["network_chi"]]:
            assert 0 < chi < 1
        # A third of the first layer's inputs is silent, and a third of its outputs is dead.
        assert step["chi"][0] <= 4 / 9
        assert step["chi"][1] <= 4 / 6


@pytest.mark.parametrize("case", CASES)
def test_the_tap_adds_no_collective_or_a_small_one_and_few_bytes(matrix, case):
    result = matrix[case]
    assert result["calls_without"] > 0
    in_bucket = case[0] <= 1 and case[1] != "fp16"
    assert result["calls_with"] == result["calls_without"] + (0 if in_bucket else 1)
    # Per layer: three integers of 12 bytes in a bucket, else six float64. Then the bytes that do not depend on layers.
    assert result["extra_bytes"] == (36 * LAYERS + 52 if in_bucket else 48 * LAYERS + 56)


@pytest.mark.parametrize("case", CASES)
def test_chi_makes_the_host_wait_for_nothing_but_in_zero_0_whether_the_gradient_is_finite(matrix, case):
    stage, precision, _ = case
    assert matrix[case]["extra_waits"] == (1 if stage == 0 and precision != "fp16" else 0)


@pytest.mark.parametrize("case", CASES)
def test_rates_and_flags_are_summed_over_ranks(matrix, case):
    for step in matrix[case]["steps"]:
        assert step["bad_samples"] == 1 + 2
        assert all(0 < rate < 1 for rate in step["firing_rate"])
        assert all(0 < coverage < 1 for coverage in step["coverage"])


def test_mean_squares_are_of_all_ranks_and_amplitudes_hold_that_of_the_surrogate(output):
    results = told(output, "SQUARES")
    assert [result["stage"] for result in results] == [1, 2]
    for result in results:
        for seen in result["seen"]:
            assert seen == pytest.approx(result["plain"], rel=1e-6)
        before, after = (torch.tensor(sums) for sums in result["sums"])
        assert (after > before).all()
        assert result["amplitudes"] == pytest.approx((before / after).sqrt().tolist(), rel=1e-6)


def test_the_same_gradient_in_more_micro_batches_counts_the_same_neuron_steps(matrix):
    for stage in STAGES:
        for name in ("chi", "firing_rate", "coverage"):
            one, other = (matrix[(stage, "fp32", a)]["steps"][0][name] for a in (1, 2))
            assert one == pytest.approx(other, abs=0.2)


@pytest.mark.faults
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_other_numbers_of_ranks(ranks):
    done = launch("tests/chi/chi_matrix.py", "short", ranks=ranks)
    assert done.returncode == 0, done.output
    results = told(done.output, "CASE")
    assert len(results) == len(STAGES) * 2
    for result in results:
        assert_exact(result)
        own = ranks > 1 and (result["stage"] >= 2 or result["precision"] == "fp16")
        assert result["calls_with"] == result["calls_without"] + own
        for step in result["steps"]:
            assert 0 < step["network_chi"] < 1
            assert step["bad_samples"] == sum(range(1, ranks + 1))


def test_zero_stages_agree(matrix):
    for precision, accumulation in PRECISIONS:
        zero, *others = (matrix[(stage, precision, accumulation)]["steps"][0] for stage in STAGES)
        for other in others:
            assert zero["chi"] == other["chi"]
            assert zero["coverage"] == other["coverage"]
            assert zero["firing_rate"] == other["firing_rate"]


def test_no_rank_updates_from_a_gradient_that_is_nan_or_was_miscounted(output):
    ranks = list(itertools.chain.from_iterable(told(output, "GUARD")))
    assert [rank["stage"] for rank in ranks] == [0, 0, 1, 1, 2, 2, 3, 3]
    for rank in ranks:
        assert rank["nan"].startswith("NonFiniteError: the gradient ")
        assert "conv1.weight has" in rank["miscounted"]
        assert rank["nan left the weights alone"]
        assert rank["miscounted left the weights alone"]


@pytest.mark.parametrize(
    ("optimizer", "slots", "groups", "engines"),
    [
        ("SGD", ["momentum_buffer"], 1, list(itertools.product(STAGES, ("fp32", "fp16")))),
        ("ADAMW", ["exp_avg", "exp_avg_sq"], 2, [(0, "fp32"), (0, "fp16"), (1, "fp32"), (2, "fp32"), (3, "fp32")]),
        ("PLAIN", [], 1, [(1, "fp32")]),  # SGD without momentum remembers nothing
    ],
)
def test_a_checkpoint_goes_back_into_every_stage_bit_for_bit(output, optimizer, slots, groups, engines):
    results = told(output, f"RESUME {optimizer}")
    assert [(result["stage"], result["precision"]) for result in results] == engines
    for result in results:
        assert list(result["slots"]) == slots
        for names in result["slots"].values():
            assert names == ["conv1.weight", "conv2.weight", "fc.bias", "fc.weight"]
        assert result["groups"] == groups
        assert result["same"], result


def test_clipping_changes_the_update_and_neither_chi_nor_the_reported_norm(output):
    results = told(output, "CLIP")
    assert [(r["stage"], r["precision"]) for r in results] == list(itertools.product(STAGES, ("fp32", "fp16")))
    for result in results:
        rounding = ROUNDING[result["precision"]]
        assert result["chi"] == result["plain_chi"]
        assert result["participation"] == pytest.approx(result["plain_participation"], rel=rounding)
        assert result["grad_norm"] == pytest.approx(result["plain_norm"], rel=rounding)
        # The first step of SGD moves the weights by the learning rate times the gradient that it is given.
        assert result["moved"] == pytest.approx(CLIP, rel=1e-3)
        assert min(result["plain_norm"]) > 10 * CLIP


def test_an_overflow_is_skipped_and_leaves_no_trace_in_the_next_reading(output):
    ranks = list(itertools.chain.from_iterable(told(output, "OVERFLOW")))
    assert [rank["stage"] for rank in ranks] == [0, 0, 1, 1, 2, 2, 3, 3]
    for rank in ranks:
        assert rank["skipped"]
        assert rank["unchanged"]
        assert rank["scale_ratio"] == 0.5
        assert not any(rank["defined"].values()), "a discarded gradient has no indicators"
        assert rank["stop"] == 1, "a skipped step also carries a request to stop"
        assert not rank["then_skipped"]
        assert rank["then_chi"] == rank["plain_chi"]
        assert rank["then_norm"] == pytest.approx(rank["plain_norm"], rel=1e-3)
        assert rank["same_rates"]


def test_a_gradient_that_no_loss_scale_mends_is_told_as_not_finite(output):
    readings = list(itertools.chain.from_iterable(told(output, "HOPELESS")))
    assert [reading["stage"] for reading in readings] == [0, 0, 1, 1, 2, 2, 3, 3]
    for reading in readings:
        assert reading["skipped"]
        at_last = "the gradient is not finite in fp16, not even with a loss scale of 1"
        assert reading["nonfinite"] == {2.0: "", 1.0: at_last}[reading["scale"]]


def test_fp16_trains_the_network_with_batch_normalisation_in_fp32(output):
    full, half = told(output, "SEW")
    assert (full["precision"], half["precision"]) == ("fp32", "fp16")
    assert (half["bn_weight"], half["bn_mean"]) == ("torch.float16", "torch.float32")
    assert not half["skipped"]
    assert half["losses"] == pytest.approx(full["losses"], rel=0.02)
    assert half["mean"] == pytest.approx(full["mean"], rel=0.02)  # after an update: spikes differ
    assert half["tracked"] == full["tracked"] == 2
    assert half["chi"] == pytest.approx(full["chi"], abs=0.02)


def test_fp16_is_refused_where_it_would_not_train(output):
    ((by_autocast, without_fp16),) = told(output, "REFUSED")
    assert by_autocast.startswith("torch_autocast with dtype=float16 in ZeRO-1 is not allowed: its loss scale does not")
    assert by_autocast.endswith("use the fp16 block (train.precision=fp16), or bf16")
    assert without_fp16.startswith("train.precision='fp16' is not allowed on this device")


def test_a_version_of_deepspeed_that_was_not_tested_is_refused(digits, tmp_path):
    code = """
import sys, deepspeed
from launch.train import main
for deepspeed.__version__ in ("0.19.7", "0.20.0"):
    print("exit code", main(sys.argv[1:]))
"""
    arguments = ["--recipe", "digits", "--data.path", digits, "--run_dir", tmp_path, "--metrics.port", "0"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.count(f"exit code {EXIT_USAGE}") == 2, done.stderr
    for version in ("0.19.7", "0.20.0"):
        assert f"error: deepspeed=={version} is not allowed: χ is read inside its gradient reduction" in done.stderr
    assert done.stderr.count("tested with >=0.19.8,<0.20; run: pip install") == 2
    assert "Traceback" not in done.stderr
