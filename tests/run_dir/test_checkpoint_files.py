"""Checkpoints on the disk: which are kept, what a damaged one costs, and a writer that reports its failures."""

import resource
import threading
from pathlib import Path

import pytest
import torch

from pipeline.errors import CheckpointError, ConfigError
from pipeline.run_dir import checkpoint_files
from pipeline.run_dir.checkpoint_writer import Writer


def saved(run_dir: Path, *steps: int, keep: int = 2) -> list[str]:
    for step in steps:
        checkpoint_files.save(run_dir, step, {"step": step, "weights": torch.full((1000,), float(step))}, keep=keep)
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def newest_step(run_dir: Path) -> int | None:
    state = checkpoint_files.load_newest(run_dir)
    return None if state is None else state["step"]


def test_the_newest_stay_and_the_best_in_addition(tmp_path):
    saved(tmp_path, 1, 2)
    checkpoint_files.mark_best(tmp_path, 1, 0.75)
    assert saved(tmp_path, 3, 4, 5) == ["best", "latest", "step-00000001", "step-00000004", "step-00000005"]
    assert checkpoint_files.best(tmp_path, 9) == 0.75
    checkpoint_files.mark_best(tmp_path, 5, 0.875)
    assert checkpoint_files.best(tmp_path, 4) == -1, "a run that goes on from before it has to reach it again"
    assert saved(tmp_path, 6, keep=1) == ["best", "latest", "step-00000005", "step-00000006"]
    assert checkpoint_files.best(tmp_path, 9) == 0.875


def truncate(folder: Path) -> None:
    state = folder / "state.pt"
    state.write_bytes(state.read_bytes()[:-1])


def flip_a_bit(folder: Path) -> None:
    state = bytearray((folder / "state.pt").read_bytes())
    state[len(state) // 2] ^= 1
    (folder / "state.pt").write_bytes(state)


def lose_the_hash(folder: Path) -> None:
    (folder / "state.sha256").unlink()


def rename_half(folder: Path) -> None:
    """As on a file system whose rename is not atomic: the folder is there, and nothing in it yet."""
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose_the_hash, rename_half])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_loaded(tmp_path, caplog, damage):
    saved(tmp_path, 1, 2)
    damage(tmp_path / "checkpoints" / "step-00000002")
    assert newest_step(tmp_path) == 1
    assert "step-00000002 is damaged" in caplog.text


def test_no_checkpoint_gives_way_to_damaged_ones_of_later_steps(tmp_path):
    """The run goes on from step 1, since the two newest are damaged."""
    saved(tmp_path, 1, 30, 40, keep=3)
    for step in (30, 40):
        flip_a_bit(tmp_path / "checkpoints" / f"step-{step:08d}")
    assert newest_step(tmp_path) == 1
    for step in (2, 3, 31, 41):
        saved(tmp_path, step)
        assert newest_step(tmp_path) == step


def writer(run_dir: Path, failures: list, done: list) -> Writer:
    return Writer(
        run_dir,
        active=True,
        keep=2,
        step=1,
        best=-1.0,
        on_failure=lambda: failures.append(threading.current_thread()),
        on_saved=lambda step, seconds: done.append(step),
    )


def test_a_writer_removes_what_a_kill_left_and_saves_one_after_another(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / "checkpoints" / ".step-00000002.tmp").mkdir()
    failures, done = [], []
    beside = writer(tmp_path, failures, done)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000001"]
    for step in (2, 3):
        beside.begin(step, {"step": step})
    beside.mark_best(3, 0.5)
    assert done == [2, 3]
    assert newest_step(tmp_path) == 3
    assert (checkpoint_files.best(tmp_path, 9), failures) == (0.5, [])


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, caplog):
    saved(tmp_path, 1, 2)
    old = tmp_path / "checkpoints" / "step-00000001"
    for path in old.iterdir():
        path.unlink()
    old.rmdir()
    old.write_text("not a folder")
    failures, done = [], []
    beside = writer(tmp_path, failures, done)
    beside.begin(3, {"step": 3})
    beside.wait()
    assert (failures, done, newest_step(tmp_path)) == ([], [3], 3)
    assert f"an old checkpoint in {tmp_path}/checkpoints could not be removed (Not a directory)" in caplog.text


class Unwritable:
    """An element of a state at which writing fails without a message, as when memory runs out."""

    def __reduce__(self):
        raise MemoryError


def test_a_failure_without_a_word_is_an_error_too(tmp_path):
    saved(tmp_path, 1)
    failures, done = [], []
    beside = writer(tmp_path, failures, done)
    beside.begin(2, {"step": Unwritable()})
    with pytest.raises(CheckpointError, match=r"the checkpoint after step 2 could not be written .* \(MemoryError; "):
        beside.wait()
    assert len(failures) == 1
    assert done == []


def test_a_checkpoint_that_does_not_fit_is_an_error_and_leaves_the_one_before_it(tmp_path):
    saved(tmp_path, 1)
    failures, done = [], []
    beside = writer(tmp_path, failures, done)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, before[1]))
    try:
        beside.begin(2, {"step": 2, "weights": torch.ones(10_000_000)})
        with pytest.raises(CheckpointError, match=r"the checkpoint after step 2 could not be written to .*MB are free"):
            beside.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(failures) == 1
    assert done == []
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000001"]
    with pytest.raises(CheckpointError):
        beside.begin(3, {"step": 3})
    assert newest_step(tmp_path) == 1


def test_a_checkpoint_of_the_first_format_is_read_as_one_of_todays(tmp_path):
    width, ones = torch.tensor([0.5, 1.0], dtype=torch.float64).log(), torch.ones(2)
    controller = {"start": width, "log_width": width, "total": torch.zeros(3, 2), "count": 3}
    neurons = {"amplitudes": ones, "rms_targets": ones}
    old = {"format": 1, "step": 7, "controller": controller, "neurons": neurons, "nonfinite_in_a_row": 2, "model": {}}
    checkpoint_files.save(tmp_path, 7, old)
    read = checkpoint_files.load_newest(tmp_path)
    del old["format"]  # that format had no such entry
    for found in (read, checkpoint_files.converted(old, tmp_path)):
        assert found is not None
        widths = found.pop("widths")
        kept = {"step": 7, "model": {}, "ema": None, "nonfinite": {"in_a_row": 2}}
        assert found == {"format": checkpoint_files.FORMAT, **kept}
        assert widths.keys() == {*controller, *neurons}
        assert torch.equal(widths["log_width"], width)
        assert torch.equal(widths["amplitudes"], ones)


def test_a_checkpoint_of_a_newer_format_is_refused(tmp_path):
    checkpoint_files.save(tmp_path, 7, {"format": checkpoint_files.FORMAT + 1, "step": 7})
    with pytest.raises(ConfigError, match=r"step-00000007 is of format 3, and this version reads up to 2; use the"):
        checkpoint_files.load_newest(tmp_path)
