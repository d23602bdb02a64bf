"""Accidents of the main job through the real launcher, two ranks: nothing is lost, one clear line, the exit code."""

import time

import pytest

from tests.conftest import kill, start
from tests.training_runs import arguments, read_until

JOB = "tests/fault_job.py"


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_falls_silent_is_given_up_after_the_timeout(digits, tmp_path, rank):
    words = arguments(digits, tmp_path / "run")
    process = start(JOB, *words, "--train.timeout_s", "4", FAULT=f"{rank} SIGSTOP forward 40")
    try:
        read_until(process, r"^step +9/")
        began = time.monotonic()
        said, _ = read_until(process, r"^error.*another rank is gone.*train.timeout_s=4 .*Timed out waiting 4000ms")
        assert time.monotonic() - began < 30, "torch's own timeout is 1800 s"
        assert "Traceback" not in said
    finally:
        kill(process)
