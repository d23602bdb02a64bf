"""The unit of docs/clusters.md under a real systemd, which is PID 1 of a container with this machine's /usr."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import EXIT_USAGE
from tests.conftest import ROOT
from tests.deploy.packages import need, tool
from tests.launch.test_ways_to_start import block

pytestmark = pytest.mark.deploy
ENDED_S = 240
"""Longer than a start takes on a machine that does much else."""


class Machine:
    """A booted container. The unit's text is the page's, with the command of a run of the digits."""

    def __init__(self, folder: Path, train: list[str]) -> None:
        self.root, self.log, self._train = folder / "root", folder / "log" / "chispike.log", train
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, shared: list[Path]) -> None:
        """Boots; returns when systemd answers. `shared` are folders of this machine that the run needs."""
        units = self.root / "etc/systemd/system"
        units.mkdir(parents=True)
        self.log.parent.mkdir()
        for name in ("bin", "sbin", "lib", "lib64"):
            (self.root / name).symlink_to(f"usr/{name}")
        for name in ("usr", "var", "run", "tmp", "opt"):
            (self.root / name).mkdir()
        for name in ("os-release", "passwd", "group", "nsswitch.conf", "ld.so.cache"):
            shutil.copy(f"/etc/{name}", self.root / "etc" / name)
        (self.root / "etc/machine-id").write_text(f"{os.urandom(16).hex()}\n")
        (self.root / "etc/hosts").write_text("127.0.0.1 localhost node-0\n")
        text = block("ini", "[Service]")
        command = next(line for line in text.splitlines() if line.startswith("ExecStart="))
        ours = f"ExecStart=/opt/chispike/.venv/bin/python -m launch.supervise --slots 2 -- {' '.join(self._train)}"
        (units / "chispike.service").write_text(text.replace(command, ours))
        (units / "chispike.service.d").mkdir()
        (units / "chispike.service.d/test.conf").write_text(
            f"[Service]\nEnvironment=DS_ACCELERATOR=cpu\nStandardOutput=append:{self.log}\nStandardError=inherit\n"
        )
        binds = [f"--bind-ro={path}" for path in ("/usr", sys.base_prefix, Path(sys.prefix).resolve())]
        binds += [f"--bind-ro={sys.prefix}:/opt/chispike/.venv"]
        for room in ("pipeline", "launch", "data_prep", "pyproject.toml"):
            binds.append(f"--bind-ro={ROOT / room}:/opt/chispike/{room}")
        binds += [f"--bind={path}" for path in (self.log.parent, *shared)]
        command = [tool("systemd-nspawn") or "", "--quiet", "--boot", f"--directory={self.root}", *binds]
        command += ["--register=no", "--keep-unit", "--private-network", "--console=pipe", "--machine=node-0"]
        said = (self.log.parent / "boot.log").open("wb")
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )
        self._until(lambda: "running" in self("systemctl", "is-system-running", check=False), 60, "systemd")

    def _first(self) -> int:
        """systemd of the container, as this machine sees it."""
        assert self._process
        assert self._process.poll() is None, (self.log.parent / "boot.log").read_text(errors="replace")[-3000:]
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[-1]) if children else 0

    def __call__(self, *command: str, check: bool = True) -> str:
        """What a command in the container prints."""
        whole = ["nsenter", "--target", str(self._first()), "--all", *command]
        return subprocess.run(whole, capture_output=True, text=True, timeout=200, check=check).stdout

    def shows(self, *names: str) -> list[str]:
        """Properties of the service, in the order of `names`."""
        shown = self("systemctl", "show", "chispike", *(f"--property={name}" for name in names))
        values = dict(line.split("=", 1) for line in shown.splitlines())
        return [values[name] for name in names]

    def said(self, pattern: str) -> int:
        """How often the service has written `pattern`."""
        return len(re.findall(pattern, self.log.read_text())) if self.log.exists() else 0

    def until_said(self, pattern: str, times: int = 1) -> None:
        """Returns when the service has written `pattern` so many times."""
        self._until(lambda: self.said(pattern) >= times, ENDED_S, pattern)

    def until_state(self, state: str) -> None:
        self._until(lambda: self.shows("ActiveState") == [state], ENDED_S, f"state {state}")

    def _until(self, there, seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not there():
            said = self.log.read_text() if self.log.exists() else (self.log.parent / "boot.log").read_text()
            assert time.monotonic() < end, f"no {what} within {seconds} s\n{said[-3000:]}"
            time.sleep(0.5)

    def close(self) -> None:
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)  # the container dies with it
            self._process.wait(timeout=30)


@pytest.fixture
def boot(digits, tmp_path) -> Iterator:
    need("systemd-nspawn", "dbus-daemon")
    made: list[Machine] = []

    def machine(*words: str) -> Machine:
        (tmp_path / "runs").mkdir()
        train = ["--recipe", "digits", "--data.path", str(digits), "--run_dir", str(tmp_path / "runs/run"), *words]
        made.append(Machine(tmp_path, train))
        made[-1].start([digits, tmp_path / "runs"])
        return made[-1]

    yield machine
    for one in made:
        one.close()


def test_the_unit_is_valid(tmp_path):
    need("systemd-analyze")
    text = block("ini", "[Service]")
    text = text.replace("/opt/chispike/.venv/bin/python", sys.executable).replace("/opt/chispike", str(ROOT))
    unit = tmp_path / "chispike.service"
    unit.write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert "chispike.service" not in done.stderr
    assert done.returncode == 0, done.stderr


def test_a_stop_is_no_failure_and_the_stop_of_another_node_starts_it_again(boot, tmp_path):
    """A node whose ranks end with 75 because another was stopped is started again; `systemctl stop` is obeyed."""
    machine = boot("--data.image_size", "8", "--train.log_every", "1", "--train.epochs", "20")
    machine("systemctl", "start", "chispike")
    machine.until_said("step +10/")
    (main,) = machine.shows("MainPID")
    machine("kill", "-TERM", main)  # what the supervisor does on the word of another node
    machine.until_said("resumed from the checkpoint after step")
    assert machine.shows("NRestarts") == ["1"]
    machine.until_said("step +[0-9]+/", times=machine.said("step +[0-9]+/") + 3)
    machine("systemctl", "stop", "chispike")
    assert machine.shows("ActiveState") == ["inactive"]  # of such a unit systemd forgets the exit code
    assert machine.said("stopped on request after step") == 2
    machine("systemctl", "start", "chispike")
    machine.until_state("inactive")
    assert (tmp_path / "runs/run/summary.json").exists()


def test_a_mistake_of_the_user_is_a_failure_and_is_not_tried_again(boot):
    machine = boot("--train.epochs", "-1")
    machine("systemctl", "start", "chispike")
    machine.until_state("failed")
    assert machine.shows("ExecMainStatus", "NRestarts") == [str(EXIT_USAGE), "0"]
