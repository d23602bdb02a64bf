"""Locks between processes: one run at a time in a folder, and those that several hold."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from pipeline.errors import ConfigError
from pipeline.run_dir import locks
from pipeline.run_dir.checkpoint_files import saved_steps
from pipeline.run_dir.checkpoint_writer import Writer
from tests.conftest import ROOT

HOLD = """
import sys
from pipeline.run_dir import locks
file = locks.hold(sys.argv[1])
print('held', flush=True)
input()
"""


def test_a_folder_in_use_is_refused_naming_who_uses_it_until_he_is_killed(digits, tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    command = ["launch/train.py", "--recipe", "digits", "--data.path", str(digits), "--run_dir", str(tmp_path)]
    second = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert second.returncode == 64
    assert second.stderr == (
        f"error: run_dir='{tmp_path}' is in use by process {holder.pid} on {socket.gethostname()}; stop that run and "
        "wait for its end, or choose another --run_dir\n"
    )
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    locks.hold(str(tmp_path), patience_s=0).close()


def test_other_data_than_the_run_was_started_with_are_refused(digits, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"data_identity": "f" * 64}))
    command = ["launch/train.py", "--recipe", "digits", "--data.path", str(digits), "--run_dir", str(tmp_path)]
    refused = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 64
    assert refused.stderr.startswith(f"error: data.path='{digits}' holds other data (data_identity ")
    assert f"than the run in {tmp_path} was started with (ffffffffffff)" in refused.stderr


def test_a_folder_that_cannot_hold_a_lock_is_refused(tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(ConfigError, match="lock cannot be written"):
        locks.hold(str(tmp_path))


def test_a_lock_is_one_holder_s_or_shared_and_free_when_it_is_closed(tmp_path):
    with open(tmp_path / "lock", "w") as one, open(tmp_path / "lock", "w") as other:
        assert locks.take(one)
        assert not locks.take(other)
        assert not locks.take(other, shared=True)
        assert locks.take(one, shared=True)
        assert locks.take(other, shared=True)
        assert not locks.wait(one, patience_s=0)
        other.close()
        assert locks.wait(one, patience_s=0)


def test_a_folder_is_locked_until_the_last_process_that_has_it_open_has_died(tmp_path):
    """What a killed process started may still write there."""
    handle = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    assert locks.take(handle)
    heir = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[handle])
    os.close(handle)
    again = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert not locks.take(again)
        heir.kill()
        heir.wait()
        assert locks.take(again)
    finally:
        os.close(again)


@pytest.mark.parametrize(("number", "refused"), [(errno.EACCES, True), (errno.ENOLCK, False)])
def test_a_file_system_that_refuses_is_busy_and_one_without_locks_gives_a_warning(
    tmp_path, monkeypatch, caplog, number, refused
):
    def flock(file, kind):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)  # such a file system is not at hand
    if refused:
        with pytest.raises(ConfigError, match="is in use by another process"):
            locks.hold(str(tmp_path), patience_s=0)
    else:
        locks.hold(str(tmp_path)).close()
        assert "lock cannot be locked (No locks available): start no second run in this folder" in caplog.text


def test_a_lock_that_excludes_nobody_is_told_of_at_the_start(tmp_path, monkeypatch, caplog):
    locks.hold(str(tmp_path)).close()
    assert not caplog.text
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # such a file system is not at hand
    locks.hold(str(tmp_path)).close()
    assert f"locks do not exclude on the file system of {tmp_path}/lock (it was granted twice" in caplog.text
    assert "start no second run in this folder, or put it on a file system with locks (NFS 4" in caplog.text


def test_a_node_that_gets_the_lock_of_rank_0_says_so(tmp_path, caplog):
    locks.look_from_another_node(tmp_path / "no")
    with locks.hold(str(tmp_path)):
        locks.look_from_another_node(tmp_path)
        assert not caplog.text
    locks.look_from_another_node(tmp_path)  # as where the lock of the other node cannot be seen
    assert "(it was granted twice, on two nodes)" in caplog.text


def test_of_two_runs_that_both_got_in_the_later_one_ends(tmp_path, monkeypatch, caplog):
    watches = []
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    for pid in (11, 12):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        locks.hold(str(tmp_path)).close()
        watches.append(locks.Watch(tmp_path))
        watches[-1].check()
    earlier, later = watches
    later.check()
    earlier.check()
    assert f"process 12 on {socket.gethostname()} has also begun to use {tmp_path}/lock" in caplog.text
    with pytest.raises(ConfigError, match=rf"{tmp_path} is in use by process 11 on .* too, which began earlier"):
        later.check()
    earlier.check()


def test_what_a_lock_s_file_may_hold_beside_a_claim_ends_nobody(tmp_path):
    locks.Watch(tmp_path).check()  # no lock
    with locks.hold(str(tmp_path)):
        watch = locks.Watch(tmp_path)
        for text in ("", "process 7 on a\n", "process 7 on a\nstart 1 ab", "start\n", "process 7 on a\nstart -1 0\n"):
            (tmp_path / "lock").write_text(text)
            watch.check()
        (tmp_path / "lock").write_bytes(b"\xff\xfe")
        watch.check()
    locks.hold(str(tmp_path)).close()
    (tmp_path / "lock").unlink()
    with pytest.raises(OSError, match="no longer there"):
        watch.check()


def test_a_run_that_came_later_saves_no_checkpoint_and_ends_with_64(tmp_path):
    with locks.hold(str(tmp_path)):
        writer = Writer(
            tmp_path, active=True, keep=2, step=0, best=-1, on_failure=lambda: None, on_saved=lambda *_: None
        )
        (tmp_path / "lock").write_text("process 7 on elsewhere\nstart 0 00000000000000ab\n")
        writer.begin(5, {"step": 5})
        with pytest.raises(ConfigError, match="in use by process 7 on elsewhere too"):
            writer.wait()
        assert saved_steps(tmp_path) == []
