"""The supervisor of one node: where it stands, what it refuses, and that a stop loses nothing."""

import os
import re
import signal
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from launch.cluster import rendezvous
from launch.cluster.processes import ALONE_S
from launch.supervise import FAREWELL_S, LEASE_S, command_line, main, newest_checkpoint, verdict
from launch.train import PATIENCE_S, refuse
from pipeline.errors import EXIT_DATA, EXIT_DONE, EXIT_INTERNAL, EXIT_STOPPED, EXIT_USAGE, LostRankError
from pipeline.run_dir import outages
from tests.conftest import free_port
from tests.support.lost_storage import Lost, WhenWaited
from tests.support.supervised import processes_with, supervise
from tests.support.training_runs import arguments, read_until
from tests.test_training import assert_same_result


@pytest.mark.parametrize(
    ("ended", "asked", "tries_left", "code"),
    [
        (EXIT_USAGE, False, True, EXIT_USAGE),
        (EXIT_DATA, True, True, EXIT_DATA),
        (EXIT_STOPPED, True, True, EXIT_STOPPED),
        (EXIT_STOPPED, False, False, EXIT_STOPPED),  # another node was asked
        (256 - signal.SIGTERM, True, True, EXIT_STOPPED),  # ended before it had a step to save
        (-signal.SIGUSR1, True, True, EXIT_STOPPED),  # so did the launcher, which got the signal too
        (-signal.SIGKILL, True, True, EXIT_INTERNAL),
        (128 + signal.SIGTERM, True, True, EXIT_INTERNAL),  # asked a second time: what it had not saved is lost
        (EXIT_DONE, True, True, EXIT_INTERNAL),
        (EXIT_INTERNAL, True, True, EXIT_INTERNAL),
        (EXIT_INTERNAL, False, True, None),
        (128 + signal.SIGTERM, False, True, None),
        (EXIT_DONE, False, True, None),  # without a result
        (EXIT_INTERNAL, False, False, EXIT_INTERNAL),
    ],
)
def test_what_follows_when_ranks_have_ended_without_a_result(ended, asked, tries_left, code):
    assert verdict(ended, asked=asked, tries_left=tries_left) == code


def test_whoever_waits_for_another_waits_longer_than_that_takes():
    given, _ = command_line(["--", "--recipe", "digits"])
    assert rendezvous.POLL_S < rendezvous.BEAT_S < rendezvous.SILENT_S < rendezvous.LINGER_S < FAREWELL_S
    assert PATIENCE_S < ALONE_S < given.grace
    assert 300 < LEASE_S < given.resolve_timeout  # CephFS takes a dead client's lock away after 300 s


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slots", "1"], "no recipe: put -- and launch/train.py's options at the end"),
        (["--nods", "2", "--", "--recipe", "digits"], "unrecognized arguments: --nods 2"),
        (["--max-restarts", "-1", "--", "--recipe", "digits"], "--max-restarts -1 is not allowed; use 0 or more"),
        (["--grace", "nan", "--", "--recipe", "digits"], "--grace nan is not allowed"),
        (["--", "--recipe", "digits", "--dry-run"], "--dry-run stands before --"),
        (["--slots", "2", "--", "--recipe", "digits", "--optim.rl", "1"], "--optim.rl is not an option"),
        (["--slots", "3", "--", "--recipe", "digits"], "world_size=3"),
    ],
)
def test_a_mistake_ends_with_64_and_one_line(words, message, capsys):
    assert main(words) == EXIT_USAGE
    output = capsys.readouterr().err
    assert message in output
    assert output.startswith("error: ")
    assert output.count("\n") == 1


def test_storage_that_is_lost_for_a_while_takes_no_restart_and_a_stop_ends_the_waiting(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(outages, "POLL_S", 0.01)
    folder = tmp_path / "disk"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/latest").write_text("step-00000005\n")
    lost = Lost(folder)
    try:
        lost.go()
        with WhenWaited(lost.come_back):
            assert newest_checkpoint(folder) == "step-00000005"
        lost.go()
        with WhenWaited(lambda: signal.raise_signal(signal.SIGTERM)):
            words = ["--slots", "2", "--", "--recipe", "digits", "--run_dir", str(folder), "--data.path", str(digits)]
            assert main(words) == EXIT_STOPPED
    finally:
        lost.come_back()
    assert newest_checkpoint(tmp_path) == ""


@pytest.mark.parametrize(("local_rank", "waits"), [("1", True), ("0", False)])
def test_only_ranks_beside_rank_0_give_it_time_to_speak(local_rank, waits, monkeypatch, capsys):
    """The signal that ends the wait is already pending; without a wait it stays pending."""
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    on_sigterm, end = signal.getsignal(signal.SIGTERM), {signal.SIGUSR2}
    signal.pthread_sigmask(signal.SIG_BLOCK, end)
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
    try:
        assert refuse(LostRankError("another rank is gone"), 1) == EXIT_INTERNAL
        assert signal.sigtimedwait(end, 0) is None if waits else signal.sigtimedwait(end, 0)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, end)
        signal.signal(signal.SIGTERM, on_sigterm)
    assert capsys.readouterr().err == "error on rank 1: another rank is gone\n"


def answer(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_sigterm_saves_and_the_next_start_finishes_as_if_nothing_had_been(digits, straight, tmp_path):
    run_dir = tmp_path / "run"
    words = ["--slots", "2", "--master-port", str(free_port()), "--", *arguments(digits, run_dir)]
    process = supervise(*words)
    _, address = read_until(process, r"metrics at (http://\S+)/metrics")
    assert answer(address[1] + "/healthz") == (200, "ok\n")
    assert answer(address[1] + "/readyz") == (503, "no\n")
    read_until(process, r"^step +6/")
    assert answer(address[1] + "/readyz") == (200, "ok\n")
    status, metrics = answer(address[1] + "/metrics")
    assert status == 200
    assert 'snn_run_restarts_total{node="0",run="run"} 0.0' in metrics
    assert re.search(r'^snn_train_last_step_timestamp_seconds{rank="1",run="run"} ', metrics, re.MULTILINE)
    assert 'snn_run_stopped{run="run"} 0.0' in metrics
    process.send_signal(signal.SIGTERM)
    with suppress(OSError):  # until it is gone, as a Prometheus that comes often
        while True:
            _, metrics = answer(address[1] + "/metrics")
    assert 'snn_run_stopped{run="run"} 1.0' in metrics
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED, output
    assert "stopped on request after step" in output
    assert processes_with(str(run_dir)) == []
    again = supervise(*words[: words.index("--")], "--", "--resume", str(run_dir))
    output, _ = again.communicate(timeout=200)
    assert again.returncode == EXIT_DONE, output
    assert_same_result(run_dir, straight)


@pytest.mark.faults
def test_a_stop_that_a_batch_system_sends_to_every_process_saves(digits, tmp_path):
    run_dir = tmp_path / "run"
    train = [*arguments(digits, run_dir), "--train.epochs", "30"]
    process = supervise("--slots", "2", "--master-port", str(free_port()), "--", *train)
    read_until(process, r"^step +6/")
    for pid in sorted(processes_with(str(run_dir)), reverse=True):
        os.kill(pid, signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED, output
    stopped = re.search(r"stopped on request after step (\d+), checkpoint saved", output)
    assert stopped, output
    assert (run_dir / "checkpoints" / f"step-{int(stopped[1]):08d}").exists()


def kill_rank(run_dir: Path, local_rank: int) -> None:
    (pid,) = set(processes_with(str(run_dir))) & set(processes_with(f"--local_rank={local_rank}"))
    os.kill(pid, signal.SIGKILL)


@pytest.mark.faults
def test_restarts_are_given_back_by_a_new_checkpoint_and_by_nothing_else(digits, tmp_path):
    run_dir = tmp_path / "run"
    train = [*arguments(digits, run_dir), "--train.epochs", "6", "--train.checkpoint_every", "20"]
    process = supervise("--slots", "2", "--max-restarts", "1", "--master-port", str(free_port()), "--", *train)
    read_until(process, r"^step +7/")
    kill_rank(run_dir, 1)
    read_until(process, r"restart 1 of 1")
    read_until(process, r"^step +45/")  # to save the second checkpoint, after step 40, it has waited for the first
    kill_rank(run_dir, 1)
    read_until(process, r"restart 1 of 1")
    read_until(process, r"^step +(21|41)/")
    kill_rank(run_dir, 1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_INTERNAL, output
    assert "were started again 1 times without a new checkpoint: given up" in output


@pytest.mark.faults
def test_ranks_end_when_their_supervisor_is_killed_and_the_next_one_finishes(digits, straight, tmp_path):
    run_dir = tmp_path / "run"
    words = ["--slots", "2", "--master-port", str(free_port()), "--", *arguments(digits, run_dir)]
    process = supervise(*words)
    read_until(process, r"^step +7/")
    process.kill()
    output, _ = process.communicate(timeout=60)  # until no process has its output open any more
    assert output.count("the supervisor is gone: leaving at once, without a checkpoint") == 2, output
    again = supervise(*words)
    output, _ = again.communicate(timeout=200)
    assert again.returncode == EXIT_DONE, output
    assert "resumed from the checkpoint after step 5" in output
    assert_same_result(run_dir, straight)
