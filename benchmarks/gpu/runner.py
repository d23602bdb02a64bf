"""Runs steps, each in a process of its own, within a budget by the clock, and keeps what they found so far on disk."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from benchmarks.gpu.steps import Step

ROOT = Path(__file__).resolve().parents[2]
MARK = "CHISPIKE_GPU_CHECK_STEP"
"""A variable that every process of a step inherits, also in a session of its own."""
INTERPRETER = {"TRITON_INTERPRET": "1", "CHISPIKE_TEST_INTERPRETER": "1"}
FINE = ("done", "skipped")
QUIET_LOOKS = 3
"""Looks in a row that find no process of a step before it counts as ended: within execve(2) one has no environment."""


class Report:
    """The report, written anew after every step: write, then rename, so that it is whole at any moment."""

    def __init__(self, path: Path, head: dict) -> None:
        self.path = path
        self.content: dict = {**head, "failed": [], "machine": {}, "steps": []}

    def add(self, outcome: dict) -> None:
        """Keeps what a step found; facts go to the head."""
        for row in outcome["rows"]:
            self.content["machine"] |= row.get("facts", {})
        outcome["rows"] = [row for row in outcome["rows"] if "facts" not in row]
        self.content["steps"].append(outcome)
        if outcome["outcome"] not in FINE:
            self.content["failed"].append(f"{outcome['name']}: {outcome['outcome']}")
        self.write()

    def write(self) -> None:
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        beside.write_text(json.dumps(self.content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        beside.replace(self.path)


def new_path(folder: Path, gpu: str, now: datetime) -> Path:
    """GPU-DATE.json in `folder`, with a number behind the date where that is taken; the name holds letters only that
    every file system takes."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", gpu).strip("-").lower()[:80] or "gpu"
    first = f"{name}-{now:%Y-%m-%d}"
    numbers = [folder / f"{first}.json", *(folder / f"{first}-{n}.json" for n in range(2, 10_000))]
    return next(path for path in numbers if not path.exists())


def environment(simulated: bool, mark: str) -> dict[str, str]:
    """The variables of a step's process."""
    variables = {name: value for name, value in os.environ.items() if name not in INTERPRETER}
    paths = [str(ROOT), *filter(None, [variables.get("PYTHONPATH")])]
    variables |= {"PYTHONPATH": os.pathsep.join(paths), MARK: mark}
    if simulated:
        variables |= {**INTERPRETER, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        variables |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"}  # idle processes take no core
    return variables


def run_step(step: Step, *, simulated: bool, options: dict, limit_s: float) -> dict:
    """Runs one step to its end, its crash or its limit; what it found until then is in the outcome."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        found, log = Path(scratch, "findings.jsonl"), Path(scratch, "log")
        job = {"module": step.module, "function": step.function, "findings": str(found)}
        job |= {"simulated": simulated, "options": options}
        began, mark = time.monotonic(), uuid.uuid4().hex
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.gpu.steps", json.dumps(job)],
                    cwd=ROOT,
                    env=environment(simulated, mark),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                return {"name": step.name, "outcome": f"not started: {error}", "seconds": 0.0, "rows": []}
            try:
                outcome = ended(process.wait(timeout=limit_s))
            except subprocess.TimeoutExpired:
                outcome = f"ended at its limit of {limit_s:.0f} s"
            finally:
                end(process, mark)
        rows = read(found)
        wrong = sum(row.get("passed") is False for row in rows)
        of_step = {"name": step.name, "outcome": outcome, "seconds": round(time.monotonic() - began, 1)}
        if outcome == "done" and wrong:
            of_step["outcome"] = f"{wrong} check{'s' * (wrong > 1)} failed"
        elif outcome == "done" and not rows:
            of_step["outcome"] = "found nothing"
        elif outcome != "done":
            of_step["log"] = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        return {**of_step, "rows": rows}


def read(found: Path) -> list[dict]:
    """The findings; a last line that a kill cut off is left out."""
    rows = []
    for line in found.read_text(encoding="utf-8", errors="replace").splitlines() if found.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def ended(code: int) -> str:
    if code == 0:
        return "done"
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def end(process: subprocess.Popen, mark: str) -> None:
    """Ends the step and every process that it started, also those in sessions of their own, such as ranks."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    quiet = 0
    while quiet < QUIET_LOOKS:
        left = marked(mark)
        quiet = 0 if left else quiet + 1
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)  # the kernel needs a moment to take their memory


def marked(mark: str) -> list[int]:
    """Processes whose mark begins like this; none on systems without /proc."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if any(each.startswith(wanted) for each in (folder / "environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def run(
    steps: Sequence[Step],
    report: Report,
    *,
    simulated: bool,
    options: dict,
    budget_s: float,
    say: Callable[[str], None],
) -> None:
    """Runs the steps of one tier in order; one that would pass the budget is left out and named.

    A step may use what the later ones do not need.
    """
    began = time.monotonic()
    for place, step in enumerate(steps):
        left = budget_s - (time.monotonic() - began)
        if left < (1 if simulated else step.usual_s):
            why = f"left out: {max(left, 0):.0f} s of {budget_s:.0f} s are left, and it takes some {step.usual_s:.0f} s"
            report.add({"name": step.name, "outcome": why, "seconds": 0.0, "rows": []})
            say(f"{step.name}: {why}")
            continue
        later = 0 if simulated else sum(other.usual_s for other in steps[place + 1 :])
        limit = min(step.limit_s, left if simulated else max(step.usual_s, left - later))
        say(f"{step.name}: {step.says} …")
        outcome = run_step(step, simulated=simulated, options=options, limit_s=limit)
        report.add(outcome)
        say(f"{step.name}: {outcome['outcome']}, {outcome['seconds']:.0f} s")
        for line in outcome.get("log", ()):
            say(f"    {line}")
