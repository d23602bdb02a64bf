"""What ends a rank from outside, with stand-ins for the launcher's two processes, which handle signals as it does."""

import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT

RUNNER = "import subprocess, sys; subprocess.Popen([sys.executable, *sys.argv[1:]]).wait()"
LAUNCHER = """
import signal, subprocess, sys, time

def pass_on(*_):
    rank.terminate()
    rank.wait(30)
    sys.exit(1)

rank = subprocess.Popen([sys.executable, *sys.argv[1:]])
signal.signal(signal.SIGINT, pass_on)
signal.signal(signal.SIGTERM, pass_on)
while rank.poll() is None:
    time.sleep(0.1)
"""
RANK = """
import threading, time
from pipeline.ranks import stop_requests as stops

stops.LOOK_S = 0.1
asked = threading.Event()
watch = stops.Watch()
watch.on_request(asked.set)
print("ready", flush=True)
while not asked.is_set():
    time.sleep(0.05)
time.sleep(1.5)  # the rest of a step: the launcher ends, the rank checks it, and signals come twice
print("saved", flush=True)
"""


def start() -> subprocess.Popen[str]:
    """Starts a launcher and its rank in a process group of their own; returns when the rank watches."""
    python = (sys.executable, "-c")
    process = subprocess.Popen(
        [*python, RUNNER, "-c", LAUNCHER, "-c", RANK],
        env={**os.environ, "LOCAL_RANK": "0", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_process_group_is_one_request(number):
    """The rank gets the signal from the kernel and from the launcher, and then finds the launcher gone."""
    process = start()
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=30)
    assert "rank 0: SIG" in output
    assert output.count("the run stops within two steps, with a checkpoint") == 1
    assert "at once, without" not in output
    assert output.endswith("saved\n")


def test_the_launchers_death_is_a_request_and_a_signal_after_it_the_first():
    process = start()
    process.kill()
    assert process.stdout
    assert process.stdout.readline() == (
        "rank 0: the launcher is gone: the run stops within two steps, with a checkpoint\n"
    )
    os.killpg(process.pid, signal.SIGTERM)
    assert process.stdout.read().endswith("saved\n")
