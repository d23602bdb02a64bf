"""Runs steps, each in a process of its own, within a budget by the clock, and keeps what they found so far on disk."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from benchmarks.gpu.steps import Step

ROOT = Path(__file__).resolve().parents[2]


class Report:
    """The report, written anew after every step: write, then rename, so that it is whole at any moment."""

    def __init__(self, path: Path | None, head: dict) -> None:
        self.path = path
        self.content: dict = {**head, "steps": []}

    def add(self, outcome: dict) -> None:
        self.content["steps"].append(outcome)
        self.write()

    def write(self) -> None:
        if self.path is None:
            return
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        beside.write_text(json.dumps(self.content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        beside.replace(self.path)

    @property
    def failed(self) -> list[str]:
        return [step["name"] for step in self.content["steps"] if step["outcome"] not in ("done", "left out")]


def new_path(folder: Path, gpu: str, now: datetime) -> Path:
    """GPU-DATE.json in `folder`, with a number behind the date where that is taken; the name holds letters only that
    every file system takes."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", gpu).strip("-").lower()[:80] or "gpu"
    first = f"{name}-{now:%Y-%m-%d}"
    numbers = [folder / f"{first}.json", *(folder / f"{first}-{n}.json" for n in range(2, 10_000))]
    return next(path for path in numbers if not path.exists())


def run_step(step: Step, *, simulated: bool, options: dict, limit_s: float) -> dict:
    """Runs one step to its end, its crash or its limit; what it found until then is in the outcome."""
    with tempfile.TemporaryDirectory() as scratch:
        found, log = Path(scratch, "findings.jsonl"), Path(scratch, "log")
        module = step.module if "." in step.module else f"benchmarks.gpu.{step.module}"
        job = {"module": module, "function": step.function, "findings": str(found), "simulated": simulated}
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        if simulated:
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        else:
            environment.pop("TRITON_INTERPRET", None)
        began = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.worker", json.dumps({**job, "options": options})],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                process.wait(timeout=limit_s)
                outcome = ended(process.returncode)
            except subprocess.TimeoutExpired:
                outcome = f"ended at its limit of {limit_s:.0f} s"
            finally:
                end(process)
        lines = found.read_text(encoding="utf-8").splitlines() if found.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        outcome_of = {"name": step.name, "outcome": outcome, "seconds": round(time.monotonic() - began, 1)}
        wrong = sum(row.get("passed") is False for row in rows)
        if outcome == "done" and wrong:
            outcome_of["outcome"] = f"{wrong} checks failed"
        elif outcome != "done":
            outcome_of["log"] = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        return {**outcome_of, "rows": rows}


def ended(code: int) -> str:
    if code == 0:
        return "done"
    return f"ended by signal {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def end(process: subprocess.Popen) -> None:
    """Ends the step and every process that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run(
    steps: Sequence[Step],
    report: Report,
    *,
    simulated: bool,
    options: dict,
    budget_s: float,
    say: Callable[[str], None] = print,
) -> None:
    """Runs the steps in order; one that would pass the budget is left out and named."""
    began = time.monotonic()
    for step in steps:
        left = budget_s - (time.monotonic() - began)
        if left < (1 if simulated else step.usual_s):
            report.add({"name": step.name, "outcome": "left out", "why": f"{left:.0f} s are left", "rows": []})
            say(f"{step.name}: left out, {left:.0f} s of {budget_s:.0f} s are left and it takes some {step.usual_s:.0f}")
            continue
        say(f"{step.name}: {step.says} …")
        outcome = run_step(step, simulated=simulated, options=options, limit_s=min(step.limit_s, left))
        report.add(outcome)
        say(f"{step.name}: {outcome['outcome']}, {outcome['seconds']:.0f} s")
        for line in outcome.get("log", ()):
            say(f"    {line}")
