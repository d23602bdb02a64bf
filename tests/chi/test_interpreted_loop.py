"""Training steps through the GPU kernels, in Triton's interpreter on the CPU: real engines of two ranks, ZeRO-1."""

import importlib.util

import pytest

from tests.conftest import launch
from tests.support.rank_lines import told

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed; triton==3.7.1 fits torch 2.13", allow_module_level=True)

COUNTED = ("firing_rate", "coverage", "chi")


@pytest.fixture(scope="module")
def cases() -> dict[str, dict]:
    done = launch("tests/chi/interpreted_loop.py", ranks=2, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.output
    assert "GPU kernels run in Triton's interpreter on the CPU" in done.output
    return {"-".join(case["case"]): case for case in told(done.output, "CASE")}


NAMES = ("fp32-add-lif", "fp32-iand-plif", "bf16-iand-plif", "fp16-and-lif")


@pytest.mark.parametrize("name", NAMES)
def test_the_steps_ran_the_kernels_and_steered(cases, name):
    case = cases[name]
    assert case["launched"][0] == []
    assert {"_forward", "_backward", "_sum_tiles", "_fold"} <= set(case["launched"][1])
    steps = case["kernels"]
    assert not any(step["skipped"] for step in steps)
    assert len({tuple(step["widths"]) for step in steps}) == len(steps) == 3
    assert all(0 < rate < 1 for step in steps for rate in step["firing_rate"] + step["coverage"])


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("fp32")])
def test_in_fp32_losses_widths_and_counts_are_the_references(cases, name):
    for ours, theirs in zip(cases[name]["kernels"], cases[name]["reference"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["widths"] == theirs["widths"]
        for count in COUNTED:
            assert ours[count] == theirs[count], count
        assert ours["participation"] == pytest.approx(theirs["participation"], rel=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("fp32")])
def test_in_half_precision_only_the_rounding_of_gradients_differs(cases, name):
    """The forward pass of the first step is the same, and so are the widths that follow from it. A gradient is rounded
    to 16 bits once more or less than in the reference: few elements are 0 in one and not in the other, and from the
    second step on the weights differ, so a potential at the threshold may fire in one alone."""
    pairs = list(zip(cases[name]["kernels"], cases[name]["reference"], strict=True))
    first, expected = pairs[0]
    assert first["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    for count in ("firing_rate", "coverage", "widths"):
        assert first[count] == expected[count], count
    for ours, theirs in pairs:
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
        assert ours["widths"] == pytest.approx(theirs["widths"], rel=0.02)
        for count in COUNTED:
            assert ours[count] == pytest.approx(theirs[count], abs=0.02), count
