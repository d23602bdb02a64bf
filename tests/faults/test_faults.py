"""Accidents of the main job through the real launcher, two ranks: nothing is lost, one clear line, the exit code."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import psutil
import pytest

from launch.options import parse
from pipeline.data.manifest import Manifest
from pipeline.data.order import Order
from pipeline.errors import EXIT_DONE, EXIT_INTERNAL, EXIT_STOPPED
from pipeline.metrics.journal import read_journal
from pipeline.ranks.stop_requests import AGAIN_S
from pipeline.run_dir.checkpoint_files import load_newest
from tests.conftest import ROOT, kill, launch, start
from tests.support.lost_storage import Lost
from tests.support.training_runs import STEPS, arguments, rank_of, read_until
from tests.test_training import assert_same_result

JOB = "tests/faults/fault_job.py"


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


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.faults
def test_a_second_signal_leaves_at_once_from_inside_a_collective(digits, tmp_path):
    """Rank 1 is stopped, so rank 0 waits for it in C++, where no Python handler runs."""
    process = start(JOB, *arguments(digits, tmp_path / "run"), FAULT="1 SIGSTOP forward 40")
    read_until(process, r"^step +9/")
    first, second = rank_of(process, 0), rank_of(process, 1)
    while second.status() != psutil.STATUS_STOPPED:
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    read_until(
        process, r"rank 0: SIGTERM: the run stops within two steps, with a checkpoint; once more \(after 2 s\), at once"
    )
    time.sleep(1.5 * AGAIN_S)
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
    assert checkpoints(run_dir) == ["best", "latest", "step-00000010", "step-00000014"]


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


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_and_all_its_ranks_stops_them_with_a_checkpoint(digits, tmp_path, number):
    """As Ctrl-C does; steps take long enough for the ranks to notice that the runner has ended."""
    run_dir = tmp_path / "run"
    process = start(JOB, *arguments(digits, run_dir), "--train.epochs", "50", FAULT="1 SLOW forward 1")
    read_until(process, r"^step +2/")
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    stopped = re.search(r"stopped on request after step (\d+), checkpoint saved", output)
    assert stopped, output
    assert "came again" not in output
    assert f"step-{int(stopped[1]):08d}" in checkpoints(run_dir)


def names_at(digits: Path, position: int, count: int) -> list[str]:
    """Names of the training samples at stream positions, computed from the order and the tars alone."""
    manifest = Manifest.load(digits / "train")
    names = []
    for shard in manifest.shards:
        with tarfile.open(digits / "train" / shard.tar) as tar:
            names += [f"{shard.tar}:{member}" for member in tar.getnames() if not member.endswith(".cls")]
    window = parse(["--recipe", "digits"]).data.window_shards
    order = Order([shard.num_samples for shard in manifest.shards], seed=0, window_shards=window)
    return [names[number] for number in order.samples(position, count)[1]]


@pytest.mark.faults
@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_steps_that_are_not_finite_are_skipped_and_named_on_all_ranks(digits, tmp_path, zero_stage):
    """Rank 1 meets a NaN in steps 7, 9 and 10."""
    run_dir = tmp_path / "run"
    words = ["--train.on_nonfinite", "skip(2)", "--train.zero_stage", str(zero_stage), "--train.eval_every_epochs", "1"]
    ended = launch(JOB, *arguments(digits, run_dir), *words, FAULT="1 NAN forward 25,33,38")
    assert ended.returncode == EXIT_DONE, ended.output
    skipped = {r["step"]: r for r in read_journal(run_dir / "metrics.jsonl") if "nonfinite" in r}
    assert list(skipped) == [7, 9, 10]
    assert skipped[7]["nonfinite_samples"] == names_at(digits, 6 * 128 + 64, 16)
    assert skipped[10]["nonfinite_samples"] == names_at(digits, 9 * 128 + 64 + 16, 16)
    for step, times in {7: 1, 9: 1, 10: 2}.items():
        assert skipped[step]["nonfinite"].endswith(f"; skipped, {times} of 2 in a row")
        assert ended.output.count(skipped[step]["nonfinite"]) == 1
    last = load_newest(run_dir)
    assert last is not None
    for tensor in (*last["model"]["parameters"].values(), *last["model"]["buffers"].values()):
        assert tensor.isfinite().all()
    records = [r for r in read_journal(run_dir / "metrics.jsonl") if "train_loss" in r]
    assert [r["step"] for r in records if r["network_chi"] is None] == [7, 9, 10]
    assert len(records) == STEPS


@pytest.mark.faults
def test_a_step_that_is_not_finite_ends_all_ranks_before_its_update(digits, straight, tmp_path):
    run_dir = tmp_path / "run"
    ended = launch(JOB, *arguments(digits, run_dir), FAULT="1 NAN forward 25", CHISPIKE_METRICS_DIR=str(tmp_path))
    assert ended.returncode == EXIT_INTERNAL, ended.output
    assert "metrics at" not in ended.output, "whoever set the folder serves"
    assert json.loads((tmp_path / "rank-0.json").read_text())["train_nonfinite_steps"] == [["run", 1]]
    (line,) = re.findall("^error.*", ended.output, re.MULTILINE)
    assert re.match(
        r"error: step 7: the gradient of \S+ and of \d+ more parameters is not finite; pixels or loss are not", line
    )
    for name in names_at(digits, 6 * 128 + 64, 16):
        assert name in line
    assert "Traceback" not in ended.output
    again = launch(JOB, *arguments(digits, run_dir), "--train.on_nonfinite", "skip(1)", FAULT="0 NAN forward 2,6")
    assert again.returncode == EXIT_INTERNAL, again.output
    assert "error: step 7: " in again.output
    assert "the last of 2 such steps in a row; no update was made from it" in again.output
    healed = launch("launch/train.py", *arguments(digits, run_dir))
    assert healed.returncode == EXIT_DONE, healed.output
    assert_same_result(run_dir, straight)


@pytest.mark.faults
def test_a_full_disk_ends_the_run_with_the_checkpoint_before_it_whole(digits, straight, tmp_path):
    run_dir, disk = tmp_path / "disk" / "run", tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        process = start("launch/train.py", *arguments(digits, run_dir), CHISPIKE_METRICS_DIR=str(tmp_path))
        read_until(process, r"^step +5/")
        while not (run_dir / "checkpoints" / "step-00000005").exists():
            time.sleep(0.05)
        with (disk / "filler").open("wb") as filler, contextlib.suppress(OSError):
            while shutil.disk_usage(disk).free > 150_000:  # room for the journal
                filler.write(bytes(50_000))
                filler.flush()
        output, _ = process.communicate(timeout=120)
        assert process.returncode == EXIT_INTERNAL, output
        assert re.search(
            r"^error: the checkpoint after step 10 could not be written to \S+ \(.*; 0 MB are free\)",
            output,
            re.MULTILINE,
        )
        saves = json.loads((tmp_path / "rank-0.json").read_text())["checkpoint_saves"]
        assert saves == [["run", "success", 1], ["run", "error", 1]]
        assert "Traceback" not in output
        assert checkpoints(run_dir) == ["latest", "step-00000005"]
        (disk / "filler").unlink()
        again = launch("launch/train.py", *arguments(digits, run_dir))
        assert "resumed from the checkpoint after step 5" in again.output
        assert_same_result(run_dir, straight)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.faults
def test_a_run_whose_folder_is_lost_for_a_while_goes_on_by_itself(digits, straight, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    lost, run_dir = Lost(disk), disk / "run"
    try:
        process = start("launch/train.py", *arguments(digits, run_dir))
        read_until(process, r"^step +2/")
        lost.go()
        read_until(
            process, r"run/checkpoints cannot be used \(Transport endpoint is not connected\): waiting up to 120 s"
        )
        lost.come_back()
        output, _ = process.communicate(timeout=200)
        assert process.returncode == EXIT_DONE, output
        assert "can be used again" in output
        assert "Traceback" not in output
        assert_same_result(run_dir, straight)
    finally:
        lost.come_back()


@pytest.mark.faults
def test_a_slow_rank_is_named_and_no_line_is_lost_with_the_console(digits, tmp_path):
    run_dir = tmp_path / "run"
    process = start(JOB, *arguments(digits, run_dir), "--train.verify_every", "1", FAULT="1 SLOW forward 9")
    read_until(process, r"^step \d+: rank 1 is slow and holds up the others: 8\d\d ms a step for data and forward")
    assert process.stdout
    process.stdout.close()
    process.wait(timeout=200)
    assert (run_dir / "summary.json").exists()
    first, second = ((run_dir / "logs" / f"rank-{rank}.log").read_text() for rank in (0, 1))
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d step 14/14  epoch", first, re.MULTILINE)
    assert re.search(r"^\S+ \S+ done: ", first, re.MULTILINE)
    assert (
        len(re.findall(r"^\S+ \S+ step \d+: [\d.]+ ms a step for data and forward passes", second, re.MULTILINE)) == 14
    )


@pytest.mark.faults
def test_a_rank_with_another_parameter_is_named_before_it_is_saved(digits, tmp_path):
    run_dir = tmp_path / "run"
    words = ["--train.zero_stage", "0", "--train.verify_every", "1000"]  # so that the save finds it
    ended = launch(JOB, *arguments(digits, run_dir), *words, ranks=4, FAULT="2 FLIP forward 13")
    assert ended.returncode == EXIT_INTERNAL, ended.output
    lines = re.findall("^error.*", ended.output, re.MULTILINE)
    assert lines[0].startswith("error: after step 10 rank 2 differs from the others in conv1.weight and ")
    assert checkpoints(run_dir) == ["latest", "step-00000005"]
    assert "Traceback" not in ended.output


@pytest.mark.faults
@pytest.mark.parametrize(("point", "rank", "passage"), [("forward", 1, 30), ("reduce", 1, 8), ("evaluate", 1, 5)])
def test_a_rank_killed_anywhere_ends_the_others_and_costs_only_what_came_after_the_last_save(
    digits, straight, tmp_path, point, rank, passage
):
    run_dir = tmp_path / "run"
    ended = launch(JOB, *arguments(digits, run_dir), FAULT=f"{rank} SIGKILL {point} {passage}")
    assert ended.returncode == 256 - signal.SIGKILL, ended.output
    assert "Traceback" not in ended.output
    again = launch("launch/train.py", *arguments(digits, run_dir))
    assert again.returncode == EXIT_DONE, again.output
    assert f"resumed from the checkpoint after step {14 if point == 'evaluate' else 5}" in again.output
    assert_same_result(run_dir, straight)
    assert not list((run_dir / "checkpoints").glob(".*.tmp"))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("point", "rank", "passage"), [("forward", 1, 30), ("reduce", 1, 8), ("save", 0, 2), ("evaluate", 1, 5)]
)
def test_sigterm_anywhere_stops_all_with_a_checkpoint_and_repeats_no_step(
    digits, straight, tmp_path, point, rank, passage
):
    run_dir = tmp_path / "run"
    ended = launch(JOB, *arguments(digits, run_dir), FAULT=f"{rank} SIGTERM {point} {passage}")
    if point == "evaluate":  # of the finished run: it ends as planned
        assert ended.returncode == EXIT_DONE, ended.output
    else:
        assert ended.returncode == EXIT_STOPPED, ended.output
        stopped = re.search(r"stopped on request after step (\d+), checkpoint saved", ended.output)
        assert stopped, ended.output
        again = launch("launch/train.py", *arguments(digits, run_dir))
        assert again.returncode == EXIT_DONE, again.output
        assert f"resumed from the checkpoint after step {stopped[1]}\n" in again.output
    assert_same_result(run_dir, straight)


@pytest.mark.faults
def test_a_clock_that_jumps_backwards_changes_no_result_and_no_rate(digits, straight, tmp_path):
    """The wall clock goes back an hour at every read, in every process."""
    (tmp_path / "sitecustomize.py").write_text(
        "import time\n_real, _looks = time.time, [0]\n"
        "def _back():\n    _looks[0] += 1\n    return _real() - 3600 * _looks[0]\n"
        "time.time = _back\n"
    )
    run_dir = tmp_path / "run"
    ended = launch("launch/train.py", *arguments(digits, run_dir), PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert ended.returncode == EXIT_DONE, ended.output
    assert_same_result(run_dir, straight)
    records = [r for r in read_journal(run_dir / "metrics.jsonl") if "train_loss" in r]
    assert all(0 < r["train_images_per_second"] < 1e6 and 0 <= r["data_wait_ratio"] <= 1 for r in records)
    stamps = [r["train_last_step_timestamp_seconds"] for r in records]
    assert stamps != sorted(stamps), "the clock did jump"
