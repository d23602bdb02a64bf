"""A file is the old one or the whole new one: what stands there after an error, and what is on the disk when."""

import errno
import os
from pathlib import Path

import pytest

from pipeline.run_dir import atomic


@pytest.fixture
def flushed(monkeypatch) -> list[tuple[str, bytes | None]]:
    """Names that were flushed to the disk, and what stood in the file `new` of their folder then."""
    found = []
    really = os.fsync

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        new = (path if path.is_dir() else path.parent) / "new"
        found.append((path.name, new.read_bytes() if new.exists() else None))
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return found


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_after(tmp_path, flushed):
    (tmp_path / "new").write_text("old")
    atomic.write(tmp_path / "new", "χ\n", sync=True)
    assert flushed == [(".new.tmp", b"old"), (tmp_path.name, "χ\n".encode())]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_what_need_not_survive_a_power_cut_waits_for_no_disk(tmp_path, flushed):
    atomic.write(tmp_path / "new", b"\0\xff")
    assert (tmp_path / "new").read_bytes() == b"\0\xff"
    assert flushed == []


def test_after_a_full_disk_the_old_file_stands_alone(tmp_path):
    """Every write to /dev/full ends with ENOSPC."""
    (tmp_path / "file.json").write_text("old")
    atomic.temporary(tmp_path / "file.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        atomic.write(tmp_path / "file.json", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file.json": "old"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_error_or_a_signal_between_leaves_the_old_file_alone(tmp_path, error):
    def write_half() -> None:
        with atomic.replacing(tmp_path / "file") as new:
            new.write_text("half")
            raise error

    (tmp_path / "file").write_text("old")
    with pytest.raises(error):
        write_half()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "old"}


def test_no_reader_meets_what_is_not_whole_and_who_sweeps_finds_it(tmp_path):
    with atomic.replacing(tmp_path / "rank-0.json") as new:
        new.write_text("half")
        assert not list(tmp_path.glob("*.json"))
        assert atomic.unfinished(tmp_path) == [new]


def test_a_folder_that_is_not_there_is_the_error_that_it_is(tmp_path):
    with pytest.raises(FileNotFoundError):
        atomic.write(tmp_path / "none" / "file", "")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        atomic.write(tmp_path / "file" / "file", "")
