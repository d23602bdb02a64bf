"""Checks a machine with a GPU: are the kernels right on it, what do they cost, do whole trainings run as they should.

    python -m benchmarks.gpu_check [--simulate] [--tier 1|2] [--only STEP] [--peer PYTHON] [--json FILE]
                                   [--budget SECONDS] [--list]

Tier 1 needs this checkout, torch and Triton, and no network; SpikingJelly 2.0, for the comparison, in the same Python
or in the one that --peer names. Tier 2 needs DeepSpeed and DALI too, and is skipped without them. Each step runs in a
process of its own, so that one that crashes or hangs takes no other with it, and the steps of a tier together take at
most --budget seconds. The results are written after every step, to GPU-DATE.json in the folder gpu of
benchmarks/results unless --json names a file. --simulate runs all steps with toy sizes on the CPU, in Triton's
interpreter: it shows that this command works, and no figure; its results go to build/gpu. Exit code: 0, also where a
goal was missed; 1 if a step failed or had no time; 2 if nothing could be checked; 130 if it was stopped.
"""

import argparse
import functools
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from benchmarks.gpu import runner
from benchmarks.gpu.runner import ROOT, Report, new_path
from benchmarks.gpu.steps import STEPS, Step

RESULTS = ROOT / "benchmarks/results"
FOLDER, SIMULATED = RESULTS / "gpu", ROOT / "build/gpu"
UNUSABLE, INTERRUPTED = 2, 130


def lines(report: dict) -> list[str]:
    """The table at the end."""
    shown = [row for step in report["steps"] for row in step["rows"] if not row.get("passed")]
    width = max((len(row["name"]) for row in shown), default=0)
    machine = report["machine"]
    table = [", ".join(f"{name} {machine[name]}" for name in ("gpu", "driver", "cuda") if machine.get(name))]
    table.append(", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items()))
    for step in report["steps"]:
        passed = sum(row.get("passed") is True for row in step["rows"])
        table.append(f"{step['name']}: {step['outcome']}; {passed} checks passed")
        table += [f"  {row['name']:{width}} {told(row)}" for row in step["rows"] if not row.get("passed")]
    table.append(f"FAILED: {'; '.join(report['failed'])}" if report["failed"] else "no step failed")
    if report.get("simulated"):
        table.append("simulated on the CPU: this says nothing about a GPU")
    return [line for line in table if line]


def told(row: dict) -> str:
    if "absent" in row:
        return f"absent: {row['absent']}"
    if "passed" in row:
        return f"FAILED: {row['said']}"
    if "value" not in row:
        return "simulated, not measured"
    goal = "" if row["goal"] is None else f"   goal {row['goal']:g}: {'met' if row['met'] else 'missed'}"
    return f"{row['value']:12.4g} {row['unit']}{goal}"


def unusable(simulated: bool) -> str | None:
    """Why nothing can be checked here, in one line."""
    for name, instead in (("torch", "pip install torch"), ("triton", "pip install triton, as torch's own builds do")):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed for {sys.executable}; {instead}"
    import torch

    if not simulated and not torch.cuda.is_available():
        return (
            "no GPU can be used here (torch.cuda.is_available() is False); on a machine with one, see nvidia-smi and "
            "that torch is a build for CUDA; --simulate runs the steps on the CPU"
        )
    return None


def tier_2_lacks() -> str | None:
    """Why the steps of tier 2 cannot run here, in one line; by importing, since a package may be there and broken."""
    command = [sys.executable, "-c", "import deepspeed, nvidia.dali"]
    try:
        done = subprocess.run(command, env=runner.environment(True, ""), capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)[:300]
    said = done.stderr.strip().splitlines()
    return None if done.returncode == 0 else (said[-1] if said else f"code {done.returncode}")[:300]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true", help="toy sizes on the CPU; measures nothing")
    parser.add_argument("--tier", type=int, choices=(1, 2), help="the steps of this tier only")
    parser.add_argument("--only", action="append", metavar="STEP", help="this step; may be given again")
    parser.add_argument("--peer", metavar="PYTHON", help="a Python that has torch and spikingjelly 2.0.0")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results here")
    parser.add_argument("--budget", type=float, default=600.0, metavar="SECONDS", help="for each tier; 600")
    parser.add_argument("--list", action="store_true", help="name the steps and end")
    return parser.parse_args(arguments)


def refused(given: argparse.Namespace) -> str | None:
    """Why this cannot be run as it is asked for, in one line."""
    names = [step.name for step in STEPS]
    wrong = next((name for name in given.only or () if name not in names), None)
    if wrong:
        return f"--only {wrong} is not a step; use one of {', '.join(names)}"
    if not given.budget > 0:
        return f"--budget {given.budget:g} is not allowed; use a number of seconds above 0"
    if given.peer and not shutil.which(given.peer):
        return f"--peer {given.peer} is not a program; give the path of a Python that has torch and spikingjelly"
    if given.simulate and given.json and given.json.resolve().is_relative_to(RESULTS):
        return f"--json {given.json} with --simulate is not allowed, since that folder has measurements; use another"
    return unusable(given.simulate)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    if given.list:
        print("\n".join(f"{step.name:12} tier {step.tier}: {step.says}" for step in STEPS))
        return 0
    why = refused(given)
    if why is not None:
        print(f"error: {why}", file=sys.stderr)
        return UNUSABLE
    words = sys.argv[1:] if arguments is None else arguments
    gpu, several = "simulated", ""
    if not given.simulate:
        import torch

        gpu, count = torch.cuda.get_device_name(0), torch.cuda.device_count()
        several = f" (cuda:0 of {count} GPUs; tier 1 uses no other)" if count > 1 else ""
    now = datetime.now()
    path = given.json or new_path(SIMULATED if given.simulate else FOLDER, gpu, now)
    command = shlex.join(["python", "-m", "benchmarks.gpu_check", *words])
    head = {"gpu": gpu, "simulated": given.simulate, "date": now.isoformat(timespec="seconds"), "command": command}
    report = Report(path, head)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        report.write()
    except OSError as error:
        print(f"error: {path} cannot be written ({error.strerror}); name another file with --json", file=sys.stderr)
        return UNUSABLE
    print(f"checking {'this command, on the CPU' if given.simulate else gpu}{several}", flush=True)
    return check(given, report)


def check(given: argparse.Namespace, report: Report) -> int:
    """Runs the wanted steps of each tier; `environment`, which says what the machine is, always."""
    interrupted = False
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a request to stop ends the step too
    try:
        for tier in (1, 2):
            steps = [step for step in STEPS if step.tier == tier and wanted(step, given)]
            lacks = tier_2_lacks() if tier == 2 and steps else None
            if lacks is not None:
                print(f"tier 2 is skipped: {lacks}")
                for step in steps:
                    row = {"name": step.name, "absent": lacks}
                    report.add({"name": step.name, "outcome": "skipped", "seconds": 0.0, "rows": [row]})
                continue
            say = functools.partial(print, flush=True)
            options = {"peer": given.peer}
            runner.run(steps, report, simulated=given.simulate, options=options, budget_s=given.budget, say=say)
    except KeyboardInterrupt:
        interrupted = report.content["interrupted"] = True
        report.write()
    finally:
        signal.signal(signal.SIGTERM, before)
    print("\n".join(lines(report.content)))
    print(f"results: {os.path.relpath(report.path)}")
    return INTERRUPTED if interrupted else 1 if report.content["failed"] else 0


def wanted(step: Step, given: argparse.Namespace) -> bool:
    if step.name == "environment":
        return True
    return (given.tier in (None, step.tier)) and (not given.only or step.name in given.only)


if __name__ == "__main__":
    raise SystemExit(main())
