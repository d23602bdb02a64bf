"""Accidents of the main job through the real launcher, two ranks: nothing is lost, one clear line, the exit code."""

import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from pipeline.errors import EXIT_DONE
from tests.conftest import kill, launch, start
from tests.test_training import assert_same_result
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


def rank_of(process: subprocess.Popen, rank: int) -> psutil.Process:
    """The process of a rank below the launcher."""
    below = psutil.Process(process.pid).children(recursive=True)
    (found,) = (p for p in below if p.environ().get("RANK") == str(rank))
    return found


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.faults
def test_a_second_signal_leaves_at_once_from_inside_a_collective(digits, tmp_path):
    """Rank 1 stands still, so that rank 0 waits for it in C++, where no Python handler runs."""
    process = start(JOB, *arguments(digits, tmp_path / "run"), FAULT="1 SIGSTOP forward 40")
    read_until(process, r"^step +9/")
    first, second = rank_of(process, 0), rank_of(process, 1)
    while second.status() != psutil.STATUS_STOPPED:
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    read_until(process, "rank 0: SIGTERM: the run stops after this step, with a checkpoint; once more, at once")
    first.send_signal(signal.SIGTERM)
    read_until(process, "rank 0: SIGTERM came again: leaving at once, without a checkpoint")
    first.wait(timeout=20)
    second.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "step-00000005" in checkpoints(tmp_path / "run")


@pytest.mark.faults
def test_a_second_signal_leaves_at_once_from_inside_a_save_and_costs_only_what_came_after_the_one_before(
    digits, straight, tmp_path
):
    run_dir = tmp_path / "run"
    ended = launch(JOB, *arguments(digits, run_dir), FAULT="0 SIGTERM+SIGTERM save 2")
    assert ended.returncode == 128 + signal.SIGTERM, ended.output
    assert "step-00000005" in checkpoints(run_dir)
    again = launch("launch/train.py", *arguments(digits, run_dir))
    assert again.returncode == EXIT_DONE, again.output
    assert "resumed from the checkpoint after step 5" in again.output
    assert_same_result(run_dir, straight)
    assert checkpoints(run_dir) == ["latest", "step-00000010", "step-00000014"]


@pytest.mark.faults
def test_a_second_run_in_a_folder_is_refused_and_the_first_goes_on(digits, straight, tmp_path):
    run_dir = tmp_path / "run"
    process = start("launch/train.py", *arguments(digits, run_dir))
    read_until(process, r"^step +2/")
    holder = rank_of(process, 0).pid
    os.kill(holder, signal.SIGSTOP)
    refused = launch("launch/train.py", *arguments(digits, run_dir))
    os.kill(holder, signal.SIGCONT)
    assert refused.returncode == 64, refused.output
    assert re.findall("^error.*", refused.output, re.MULTILINE) == [
        f"error: run_dir='{run_dir}' is in use by process {holder} on {socket.gethostname()}; stop that run and wait "
        "for its end, or choose another --run_dir"
    ]
    output, _ = process.communicate(timeout=200)
    assert process.returncode == EXIT_DONE, output
    assert_same_result(run_dir, straight)


@pytest.mark.faults
@pytest.mark.parametrize("generation", ["runner", "launch.py"])
def test_ranks_whose_launcher_is_killed_stop_with_a_checkpoint(digits, tmp_path, generation):
    run_dir = tmp_path / "run"
    process = start("launch/train.py", *arguments(digits, run_dir), "--train.epochs", "50")
    read_until(process, r"^step +2/")
    ranks = [rank_of(process, rank) for rank in (0, 1)]
    os.kill(process.pid if generation == "runner" else ranks[0].ppid(), signal.SIGKILL)
    read_until(process, r"the launcher is gone: the run stops")
    _, stopped = read_until(process, r"stopped on request after step (\d+), checkpoint saved")
    psutil.wait_procs(ranks, timeout=30)
    assert not any(rank.is_running() for rank in ranks)
    assert f"step-{int(stopped[1]):08d}" in checkpoints(run_dir)
