"""Storage that is gone for a while is waited for, wherever a path is opened; then the exit code is 70, and never 64."""

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from launch import command, evaluate, export, local, train
from launch.options import parse
from pipeline.data.manifest import check_splits
from pipeline.data.remote import ClosedError
from pipeline.data.shard_reader import Shards
from pipeline.errors import EXIT_INTERNAL, CheckpointError, ConfigError, StoreError
from pipeline.metrics.journal import Journal, read_journal
from pipeline.run import Run
from pipeline.run_dir import checkpoint_files, locks, outages, run_folder
from pipeline.run_dir.checkpoint_writer import Writer
from pipeline.run_dir.outages import Lines
from tests.support.lost_storage import Lost, ReadOnly, WhenWaited


@pytest.fixture(autouse=True)
def _often(monkeypatch) -> None:
    monkeypatch.setattr(outages, "POLL_S", 0.01)


@pytest.fixture
def lost(tmp_path) -> Iterator[Lost]:
    """A folder with a run, whose storage can go."""
    folder = tmp_path / "disk"
    run_folder.write_json(made(folder / "run") / "run.json", {"data_identity": "a"})
    locks.hold(str(folder / "run")).close()
    checkpoint_files.save(folder / "run", 5, {"step": 5, "weights": torch.ones(10)})
    checkpoint_files.mark_best(folder / "run", 5, 0.5)
    storage = Lost(folder)
    yield storage
    storage.come_back()


def made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def config_for(run_dir: Path):
    return parse(["--recipe", "digits", "--run_dir", str(run_dir)])


USES = {
    "admit": lambda run: run_folder.admit(config_for(run), 2),
    "identity": lambda run: run_folder.refuse_other_data(config_for(run), "a"),
    "lock": lambda run: locks.hold(str(run)).close(),
    "newest": lambda run: (checkpoint_files.load_newest(run) or {})["step"],
    "to resume": lambda run: (checkpoint_files.load_to_resume(run) or {})["step"],
    "of a step": lambda run: checkpoint_files.load_step(run, 5)["step"],
    "steps": checkpoint_files.saved_steps,
    "best": lambda run: checkpoint_files.best(run, 9),
    "mark": lambda run: checkpoint_files.mark_best(run, 5, 0.75),
    "description": lambda run: run_folder.describe(
        config_for(run), data_identity="a", classes=(), layers=(), num_parameters=1, world_size=2
    ),
    "journal": lambda run: Journal(run / "metrics.jsonl", 0).close(),
    "log": lambda run: Lines(run / "log", lossy=True).close(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_lost_storage_is_waited_for_and_ends_with_70_where_it_stays_away(use, lost, monkeypatch):
    run, expected = lost.folder / "run", use(lost.folder / "run")
    lost.go()
    with WhenWaited(lost.come_back) as waited:
        assert use(run) == expected
    assert waited.waited == 1
    monkeypatch.setattr(outages, "PATIENCE_S", 0.0)
    lost.go()
    with pytest.raises(StoreError, match=r"Transport endpoint is not connected.*bring its storage back") as refused:
        use(run)
    assert refused.value.exit_code == EXIT_INTERNAL
    assert "\n" not in str(refused.value)


def test_a_folder_that_is_read_only_now_is_lost_and_one_that_always_was_is_refused(tmp_path, monkeypatch):
    disk = ReadOnly(tmp_path / "disk")
    try:
        config, other = config_for(disk.folder / "run"), config_for(disk.folder / "other")
        run_folder.admit(config, 2)
        run_folder.admit(other, 2)
        locks.hold(config.run_dir).close()
        disk.go()
        for refused in (other, config_for(disk.folder / "new")):
            with pytest.raises(ConfigError, match=r"is not writable|cannot be made \(Read-only file system\)"):
                run_folder.admit(refused, 2)
        for use in (lambda: run_folder.admit(config, 2), lambda: locks.hold(config.run_dir).close()):
            with WhenWaited(disk.come_back) as waited:
                use()
            assert waited.waited == 1
            disk.go()
        monkeypatch.setattr(outages, "PATIENCE_S", 0.0)
        with pytest.raises(StoreError, match="Read-only file system"):
            run_folder.admit(config, 2)
    finally:
        disk.end()


@pytest.mark.parametrize("command", [train.main, local.main], ids=["rank", "local"])
def test_a_command_says_in_one_line_that_storage_is_lost(command, lost, digits, monkeypatch, capsys):
    monkeypatch.setattr(outages, "PATIENCE_S", 0.0)
    lost.go()
    words = ["--recipe", "digits", "--run_dir", str(lost.folder / "run"), "--data.path", str(digits)]
    assert command(words) == EXIT_INTERNAL
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("WARNING")]
    assert line.startswith(f"error: run_dir='{lost.folder}/run' cannot be used (Transport endpoint is not connected)")


def test_a_checkpoint_is_saved_when_the_storage_is_back(lost, monkeypatch):
    run, failures = lost.folder / "run", []
    writer = Writer(
        run,
        active=True,
        keep=2,
        step=5,
        best=0.5,
        on_failure=lambda: failures.append(1),
        on_saved=lambda *_: None,
    )
    lost.go()
    with WhenWaited(lost.come_back) as waited:
        writer.begin(6, {"step": 6})
        writer.wait()
    assert waited.waited == 1
    assert checkpoint_files.saved_steps(run) == [5, 6]
    assert not failures
    monkeypatch.setattr(outages, "PATIENCE_S", 0.0)
    lost.go()
    writer.begin(7, {"step": 7})
    with pytest.raises(CheckpointError, match=r"checkpoint after step 7 could not be written: .*not connected"):
        writer.wait()
    assert failures
    lost.come_back()
    assert checkpoint_files.saved_steps(run) == [5, 6]


def test_a_checkpoint_is_not_written_into_an_empty_mount_point(lost, tmp_path, monkeypatch):
    run = lost.folder / "run"
    made_by = {"active": True, "keep": 2, "step": 5, "best": 0.5, "on_saved": lambda *_: None}
    with locks.hold(str(run)):
        writer = Writer(run, on_failure=lambda: None, **made_by)
        monkeypatch.setattr(outages, "PATIENCE_S", 0.0)
        shutil.move(run, tmp_path / "away")
        run.mkdir()
        writer.begin(6, {"step": 6})
        with pytest.raises(CheckpointError, match="no longer there"):
            writer.wait()
        assert not list(run.iterdir())


def kill_the_descriptor(lines: Lines) -> None:
    """As an outage does: every write to it fails from now on, also when the storage is back."""
    with socket.socket(socket.AF_UNIX) as unconnected:
        os.dup2(unconnected.fileno(), lines._file)


def test_lines_wait_for_the_storage_while_training_goes_on(tmp_path, monkeypatch):
    folder = made(tmp_path / "disk")
    journal, lost = Journal(folder / "metrics.jsonl", 0), Lost(folder)
    try:
        journal.write({"step": 1})
        with (folder / "metrics.jsonl").open("a") as half:
            half.write('{"step": ')
        lost.go()
        kill_the_descriptor(journal._lines)
        with WhenWaited(lambda: None) as told:
            for step in (2, 3):
                journal.write({"step": step})
        assert told.waited == 1
        lost.come_back()
        journal.write({"step": 4})
        assert [record["step"] for record in read_journal(folder / "metrics.jsonl")] == [1, 2, 3, 4]
        lost.go()
        kill_the_descriptor(journal._lines)
        journal.write({"step": 5})
        with WhenWaited(lost.come_back):
            journal.close()
        assert read_journal(folder / "metrics.jsonl")[-1] == {"step": 5}
        journal = Journal(folder / "metrics.jsonl", 5)
        lost.go()
        kill_the_descriptor(journal._lines)
        monkeypatch.setattr(outages, "PATIENCE_S", 0.0)
        with pytest.raises(StoreError, match=r"metrics\.jsonl cannot be used"):
            journal.write({"step": 6})
    finally:
        lost.come_back()


def test_a_rank_s_log_never_ends_it(tmp_path):
    folder = made(tmp_path / "disk")
    (folder / "log").write_text("before\n")
    lines, lost = Lines(folder / "log", lossy=True), Lost(folder)
    try:
        lost.go()
        kill_the_descriptor(lines)
        lines.write("x" * Lines.MOST_BYTES)
        lines.write("last\n")
        lost.come_back()
        lines.write("back\n")
    finally:
        lost.come_back()
    lines.close()
    text = (folder / "log").read_text()
    assert text.startswith("before\nx")
    assert text.endswith("xlast\nback\n")
    assert len(text) == len("before\n") + Lines.MOST_BYTES + len("back\n")


def test_shards_are_read_when_their_storage_is_back_and_no_sample_counts_as_bad(digits, tmp_path, monkeypatch):
    data = Path(shutil.copytree(digits, tmp_path / "disk"))
    lost, shards = Lost(data), Shards(str(data / "train"))
    settings = parse(["--recipe", "digits", "--data.path", str(data)]).data
    (owner,), (record,) = shards.locate(np.array([0]))
    place = int(owner), int(record["offset"]), int(record["length"])
    expected = shards.read(*place)
    try:
        for use in (lambda: check_splits(settings).num_samples, lambda: fresh(shards).read(*place)):
            lost.go()
            with WhenWaited(lost.come_back) as waited:
                assert use() in (expected, shards.manifest.num_samples)
            assert waited.waited >= 1
        lost.go()
        with WhenWaited(shards.interrupt), pytest.raises(ClosedError):
            fresh(shards).read(*place)
        shards = Shards(str(data / "train")) if lost.come_back() is None else shards
        lost.go()
        monkeypatch.setattr(outages, "PATIENCE_S", 0.0)
        with pytest.raises(StoreError, match=r"data\.path: .*/train cannot be used"):
            shards.read(*place)
    finally:
        lost.come_back()
        shards.close()


def fresh(shards: Shards) -> Shards:
    """With no file open."""
    while shards._open:
        shards._shut(shards._open.popitem()[1])
    return shards


def test_closing_a_run_hides_no_earlier_error_and_closes_every_part():
    closed = []

    def part(name: str, error: Exception | None = None) -> Any:
        def close() -> None:
            closed.append(name)
            if error is not None:
                raise error

        return SimpleNamespace(close=close)

    run = Run.__new__(Run)
    run.trace, run.writer, run.log, run.loader = (
        part("a", OSError(5, "io")),
        part("b"),
        part("c", StoreError("no")),
        part("d"),
    )
    with pytest.raises(ValueError, match="first"), run:
        raise ValueError("first")
    assert closed == ["a", "b", "c", "d"]
    with pytest.raises(OSError, match="io"), run:
        pass


@pytest.mark.parametrize("name", ["export", "evaluate"])
def test_commands_on_a_run_whose_storage_is_lost_end_with_70_and_one_line(name, lost, monkeypatch, capsys):
    monkeypatch.setattr(outages, "PATIENCE_S", 0.0)
    main = {"export": export.main, "evaluate": evaluate.main}[name]
    monkeypatch.setattr(
        sys, "argv", [name, str(lost.folder / "run"), *(["net.safetensors"] if name == "export" else [])]
    )
    lost.go()
    assert command.run(main) == EXIT_INTERNAL
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "Transport endpoint is not connected" in said
    assert said.count("\n") == 1


def test_a_full_disk_ends_no_log(tmp_path):
    lines = Lines(tmp_path / "log", lossy=True)
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), lines._file)
    lines.write("first\n")
    lines.write("second\n")
    lines.close()
    assert (tmp_path / "log").read_text() == "first\nsecond\n"
