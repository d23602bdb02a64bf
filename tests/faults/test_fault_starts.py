"""Starts of the main job that must be refused, or that find something damaged, through the real launcher, two ranks:
one clear line, the exit code, and the run that was there goes on to the result of an undisturbed one."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.data.manifest import Manifest
from pipeline.errors import EXIT_DATA, EXIT_DONE, EXIT_STOPPED, EXIT_USAGE
from tests.conftest import ROOT, Ended, free_port, launch, start
from tests.run_dir.test_checkpoint_files import flip_a_bit, lose_the_hash, rename_half, truncate
from tests.support.lost_storage import ReadOnly
from tests.support.training_runs import arguments, rank_of, read_until
from tests.test_training import assert_same_result

TRAIN = "launch/train.py"


@pytest.fixture(scope="module")
def half_done(digits, tmp_path_factory) -> tuple[Path, int]:
    """A run that was stopped on request, and its last step; it has checkpoints after step 5 and after that step."""
    run_dir = tmp_path_factory.mktemp("half") / "run"
    ended = launch("tests/faults/fault_job.py", *arguments(digits, run_dir), FAULT="0 SIGTERM forward 30")
    assert ended.returncode == EXIT_STOPPED, ended.output
    stopped = re.search(r"stopped on request after step (\d+), checkpoint saved", ended.output)
    assert stopped, ended.output
    return run_dir, int(stopped[1])


@pytest.fixture
def run_dir(half_done, tmp_path) -> Path:
    """A copy of `half_done`'s run."""
    return Path(shutil.copytree(half_done[0], tmp_path / "run"))


def contents(run_dir: Path) -> dict[Path, bytes]:
    """Every file of a run, except the lock (it names its last holder) and the logs (they grow at every start)."""
    files = (path for path in sorted(run_dir.rglob("*")) if path.is_file())
    return {path: path.read_bytes() for path in files if path.name != "lock" and path.parent.name != "logs"}


def assert_refused(ended: Ended, line: str) -> None:
    """With one line, which begins with `line`, and the code of a user's mistake."""
    assert ended.returncode == EXIT_USAGE, ended.output
    (said,) = re.findall("^error.*", ended.output, re.MULTILINE)
    assert said.startswith(line), ended.output
    assert "Traceback" not in ended.output


def assert_goes_on(digits: Path, run_dir: Path, straight, step: int, *words: str) -> str:
    """The same command takes the run from the checkpoint after `step` to its end; returns its output."""
    again = launch(TRAIN, *arguments(digits, run_dir), *words)
    assert again.returncode == EXIT_DONE, again.output
    assert f"resumed from the checkpoint after step {step}\n" in again.output
    assert_same_result(run_dir, straight)
    return again.output


@pytest.mark.faults
def test_a_metrics_port_that_is_taken_is_refused_and_the_run_goes_on_with_another(digits, straight, half_done, run_dir):
    before = contents(run_dir)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused = launch(TRAIN, *arguments(digits, run_dir), "--metrics.port", port)
        assert_refused(refused, f"error: metrics.port={port} on 127.0.0.1 cannot be opened (Address already in use)")
        assert contents(run_dir) == before
    output = assert_goes_on(digits, run_dir, straight, half_done[1], "--metrics.port", port)
    assert f"metrics at http://127.0.0.1:{port}/metrics" in output


@pytest.mark.faults
def test_settings_that_change_results_are_refused_by_name_and_the_old_ones_go_on(digits, straight, half_done, run_dir):
    before = contents(run_dir)
    for name, old, new in (("optim.lr", 0.4, "0.2"), ("data.micro_batch", 16, "32"), ("train.seed", 0, "1")):
        refused = launch(TRAIN, *arguments(digits, run_dir), f"--{name}", new)
        assert_refused(refused, f"error: {name}={new}, but the run in {run_dir} was started with {old}; use that value")
        assert contents(run_dir) == before
    assert_goes_on(digits, run_dir, straight, half_done[1])


@pytest.mark.faults
def test_other_data_in_the_place_of_the_runs_are_refused_and_with_the_old_ones_it_goes_on(
    digits, straight, half_done, run_dir, tmp_path
):
    before, data = contents(run_dir), tmp_path / "data"
    make = [sys.executable, "-m", "data_prep", "digits", str(data), "--shard-bytes", "300Ki"]
    subprocess.run(make, check=True, cwd=ROOT)
    old, new = (Manifest.load(folder / "train").identity[:12] for folder in (digits, data))
    assert old != new
    refused = launch(TRAIN, *arguments(data, run_dir))
    assert_refused(
        refused, f"error: data.path='{data}' holds other data (data_identity {new}) than the run in {run_dir}"
    )
    assert f"was started with ({old})" in refused.output
    assert contents(run_dir) == before
    shutil.rmtree(data)
    shutil.copytree(digits, data)
    assert_goes_on(data, run_dir, straight, half_done[1])


@pytest.mark.faults
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose_the_hash, rename_half])
def test_a_damaged_checkpoint_is_named_and_costs_what_came_after_the_one_before(
    digits, straight, half_done, run_dir, damage
):
    damage(run_dir / "checkpoints" / f"step-{half_done[1]:08d}")
    output = assert_goes_on(digits, run_dir, straight, 5)
    assert output.count(f"step-{half_done[1]:08d} is damaged") == 1


@pytest.mark.faults
def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(digits, straight, half_done, run_dir):
    for step in (5, half_done[1]):
        flip_a_bit(run_dir / "checkpoints" / f"step-{step:08d}")
    before = contents(run_dir)
    refused = launch(TRAIN, *arguments(digits, run_dir))
    assert refused.returncode == EXIT_DATA, refused.output
    assert re.findall("^error.*", refused.output, re.MULTILINE) == [
        f"error: {run_dir}/checkpoints has none that can be read (after steps 5, {half_done[1]}: all damaged); restore "
        "one, or remove that folder to train from the start"
    ]
    assert contents(run_dir) == before
    flip_a_bit(run_dir / "checkpoints" / "step-00000005")
    assert_goes_on(digits, run_dir, straight, 5)


@pytest.mark.faults
def test_a_second_run_in_a_folder_is_refused_and_the_first_goes_on(digits, straight, tmp_path):
    run_dir = tmp_path / "run"
    process = start(TRAIN, *arguments(digits, run_dir))
    read_until(process, r"^step +2/")
    holder = rank_of(process, 0).pid
    os.kill(holder, signal.SIGSTOP)
    refused = launch(TRAIN, *arguments(digits, run_dir))
    os.kill(holder, signal.SIGCONT)
    assert_refused(
        refused,
        f"error: run_dir='{run_dir}' is in use by process {holder} on {socket.gethostname()}; stop that run and wait "
        "for its end, or choose another --run_dir",
    )
    output, _ = process.communicate(timeout=200)
    assert process.returncode == EXIT_DONE, output
    assert_same_result(run_dir, straight)


@pytest.mark.faults
def test_a_second_training_on_a_launchers_port_is_refused_and_the_first_goes_on(digits, straight, tmp_path):
    """As when both jobs keep the launcher's default port, 29500."""
    first, port = tmp_path / "first", free_port()
    process = start(TRAIN, *arguments(digits, first), master_port=port)
    read_until(process, r"^step +2/")
    holder = rank_of(process, 0).pid
    os.kill(holder, signal.SIGSTOP)
    refused = launch(TRAIN, *arguments(digits, tmp_path / "second"), master_port=port)
    os.kill(holder, signal.SIGCONT)
    assert_refused(refused, f"error: port {port}, on which the ranks meet, cannot be opened (Address already in use)")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == EXIT_DONE, output
    assert_same_result(first, straight)


@pytest.mark.faults
def test_a_run_folder_of_another_user_is_refused(digits, straight, half_done, run_dir, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root, to become a user without rights in the folder")
    for folder in (tmp_path, *tmp_path.parents[:2], digits, digits.parent):
        folder.chmod(0o755)
    before = contents(run_dir)
    as_nobody = tmp_path / "as_nobody.py"
    as_nobody.write_text(
        "import os, sys\nfrom launch.train import main\nos.setuid(65534)\nsys.exit(main(sys.argv[1:]))\n"
    )
    refused = launch(str(as_nobody), *arguments(digits, run_dir))
    assert_refused(refused, f"error: run_dir='{run_dir}' is not writable; choose another")
    assert contents(run_dir) == before
    assert_goes_on(digits, run_dir, straight, half_done[1])


@pytest.mark.faults
def test_a_disk_that_is_read_only_for_a_while_is_waited_for_and_changed_by_nothing(
    digits, straight, half_done, tmp_path
):
    disk = ReadOnly(tmp_path / "disk")
    try:
        run_dir = Path(shutil.copytree(half_done[0], disk.folder / "run"))
        before = contents(run_dir)
        disk.go()
        process = start(TRAIN, *arguments(digits, run_dir))
        read_until(process, r"run_dir=\S+ cannot be used \(Read-only file system\): waiting up to 120 s")
        assert contents(run_dir) == before
        disk.come_back()
        output, _ = process.communicate(timeout=200)
        assert process.returncode == EXIT_DONE, output
        assert f"resumed from the checkpoint after step {half_done[1]}\n" in output
        assert_same_result(run_dir, straight)
    finally:
        disk.end()
