"""One run at a time in a folder: the lock of its rank 0."""

import json
import signal
import socket
import subprocess
import sys

import pytest

from pipeline.errors import ConfigError
from pipeline.run_dir import run_lock
from tests.conftest import ROOT

HOLD = """
import sys
from pipeline.run_dir import run_lock
file = run_lock.hold(sys.argv[1])
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
    run_lock.hold(str(tmp_path), patience_s=0).close()


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
        run_lock.hold(str(tmp_path))
