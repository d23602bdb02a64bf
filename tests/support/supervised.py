"""Supervisors as tests start them, and what is left of them."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

NEUTRAL = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PET_", "JOB"))}


def supervise(
    *arguments: str, prefix: tuple[str, ...] = (), cwd: Path = ROOT, **variables: str
) -> subprocess.Popen[str]:
    """Starts `python -m launch.supervise` in its own session, behind the command `prefix`."""
    return subprocess.Popen(
        [
            *prefix,
            sys.executable,
            "-m",
            "launch.supervise",
            "--metrics-host",
            "127.0.0.1",
            "--metrics-port",
            "0",
            *arguments,
        ],
        cwd=cwd,
        env={**NEUTRAL, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(cwd), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def processes_with(word: str) -> list[int]:
    """The processes, zombies included, whose command line or parent's has `word` in it."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if word in (folder / "cmdline").read_text():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code, and the output after the line with the address of its metrics."""
    output, _ = process.communicate(timeout=120)
    return process.returncode, output.partition("/metrics\n")[2]
