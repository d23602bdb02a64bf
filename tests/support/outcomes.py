"""`pytest --log-to FILE`: appends the command, the machine, and each test's outcome and time as it ends, to a file.

docs/faults.log and docs/deploy.log are such files. Lines of earlier runs of pytest stay, so that several runs can share
a file.
"""

import os
import platform
import shlex
import time
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.table import processor
from pipeline.run_dir import code_version


class Outcomes:
    """A pytest plugin."""

    def __init__(self, path: Path, arguments: tuple[str, ...]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._seconds: dict[str, float] = defaultdict(float)
        self._said: dict[str, str] = {}
        self._counts: Counter[str] = Counter()
        self._began = time.monotonic()
        packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "nvidia-dali-cuda130"))
        machine = f"{processor()}, {len(os.sched_getaffinity(0))} cores"
        self.write(f"$ pytest {shlex.join(arguments)}")
        self.write(f"{time.strftime('%Y-%m-%d %H:%M')}; {machine}; the program's hash {code_version.version()}")
        self.write(f"Python {platform.python_version()}, {packages}")

    def write(self, line: str) -> None:
        """Appends a line."""
        self._file.write(line + "\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] += report.duration
        if report.outcome != "passed" or report.when == "call":
            self._said.setdefault(report.nodeid, report.outcome)
        if report.outcome == "failed":
            self._said[report.nodeid] = "failed"

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        outcome = self._said[nodeid]
        self._counts[outcome] += 1
        self.write(f"{outcome:<7} {self._seconds[nodeid]:5.0f} s  {nodeid}")

    def pytest_sessionfinish(self) -> None:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self._counts.items())) or "nothing run"
        self.write(f"{counts} in {time.monotonic() - self._began:.0f} s\n")
        self._file.close()
