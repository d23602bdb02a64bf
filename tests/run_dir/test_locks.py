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
