"""What tests share: shards of the digits, and a way to run the real launcher."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import settings

ROOT = Path(__file__).parent.parent
# Waiting threads must not spin: on two cores they would slow the ranks that they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# No test is timed: hypothesis would fail an example that takes 0.2 s, which happens on a busy machine.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--log-to", type=Path, metavar="FILE", help="append every test's outcome and time to FILE")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.log_to:
        from tests.support.outcomes import Outcomes

        config.pluginmanager.register(Outcomes(config.option.log_to, config.invocation_params.args))


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """Shards of scikit-learn's digits, made by the real command."""
    folder = tmp_path_factory.mktemp("digits")
    subprocess.run([sys.executable, "-m", "data_prep", "digits", str(folder)], check=True, cwd=ROOT)
    return folder


@pytest.fixture(scope="session")
def straight(digits, tmp_path_factory):
    """A finished run, see training_runs.py; copy it before you change anything in it."""
    from tests.support.training_runs import run_and_scrape  # it starts the launcher by this file's functions

    return run_and_scrape(digits, tmp_path_factory.mktemp("straight") / "run")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    script: str, *arguments: str, ranks: int = 2, master_port: int | None = None, **environment: str
) -> subprocess.Popen[str]:
    """Starts `script` on CPU ranks by the real deepspeed launcher, in a process group of its own."""
    command = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(master_port or free_port()),
        script,
        *arguments,
    ]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


class Ended(NamedTuple):
    returncode: int
    output: str
    """What the launcher and all ranks wrote to stdout and stderr."""


def launch(script: str, *arguments: str, ranks: int = 2, master_port: int | None = None, **environment: str) -> Ended:
    """Runs `script` as `start` does, to its end."""
    process = start(script, *arguments, ranks=ranks, master_port=master_port, **environment)
    try:
        output, _ = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    return Ended(process.returncode, output)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and all its ranks, as a power cut would do."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
