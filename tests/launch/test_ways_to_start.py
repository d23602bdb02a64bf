"""The examples of docs/clusters.md do what the page says of them."""

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import supervise
from pipeline.errors import EXIT_DATA, EXIT_DONE, EXIT_INTERNAL, EXIT_STOPPED, EXIT_USAGE
from tests.conftest import ROOT


def block(kind: str, word: str) -> str:
    """The page's only example in the language `kind` that has `word` in it."""
    page = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")
    (found,) = [text for text in re.findall(rf"^```{kind}\n(.*?)^```$", page, re.M | re.S) if word in text]
    return found


@pytest.mark.parametrize("code", [EXIT_DONE, EXIT_USAGE, EXIT_DATA, EXIT_INTERNAL, EXIT_STOPPED])
def test_the_slurm_script_queues_again_what_was_stopped_and_keeps_every_exit_code(code, tmp_path):
    (tmp_path / "job.sh").write_text(block("sh", "#SBATCH"))
    for name, line in (("srun", f"exit {code}"), ("scontrol", f'echo "$@" > {tmp_path}/asked')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "17"}
    assert subprocess.run(["/bin/sh", tmp_path / "job.sh"], env=environ, check=False).returncode == code
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 17\n" if code == EXIT_STOPPED else "")


def test_the_systemd_unit_asks_the_supervisor_alone_to_stop_and_gives_it_time(tmp_path):
    text = block("ini", "[Service]")
    unit = configparser.ConfigParser()
    unit.optionxform = str  # pyright: ignore[reportAttributeAccessIssue]
    unit.read_string(text)
    service = unit["Service"]
    given, _ = supervise.command_line(service["ExecStart"].split()[3:])
    assert service["KillMode"] == "mixed"
    assert float(service["TimeoutStopSec"]) >= given.grace + 20
    assert service["RestartPreventExitStatus"].split() == [str(EXIT_USAGE), str(EXIT_DATA)]
    assert unit["Install"]["WantedBy"]  # else `systemctl enable` does nothing
    if shutil.which("systemd-analyze"):
        there = text.replace("/opt/chispike/.venv/bin/python", sys.executable).replace("/opt/chispike", str(ROOT))
        Path(tmp_path, "chispike.service").write_text(there)
        checked = subprocess.run(
            ["systemd-analyze", "verify", str(tmp_path / "chispike.service")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "chispike.service" not in checked.stderr, checked.stderr
