"""Checks a machine with a GPU: are the kernels right on it, what do they cost, how fast is a training step.

    python -m benchmarks.gpu_check [--simulate] [--only STEP] [--peer PYTHON] [--json FILE] [--budget SECONDS] [--list]

It needs this checkout, torch and Triton, and no network; SpikingJelly 2.0, for the comparison, in the same Python or in
the one that --peer names. Each step runs in a process of its own, so that one that crashes or hangs takes no other with
it, and all together take at most --budget seconds. The results are written after every step, to
benchmarks/results/gpu/GPU-DATE.json unless --json names a file. --simulate runs all steps with toy sizes on the CPU, in
Triton's interpreter: it shows that this command works, and no figure. Exit code: 0, also where a goal was missed; 1
if a step failed; 2 if nothing could be checked.
"""

import argparse
import importlib.util
import os
import shlex
import sys
from datetime import datetime
from pathlib import Path

from benchmarks.gpu import runner
from benchmarks.gpu.runner import ROOT, Report, new_path
from benchmarks.gpu.steps import STEPS

FOLDER = ROOT / "benchmarks/results/gpu"
UNUSABLE = 2


def lines(report: dict) -> list[str]:
    """The table at the end."""
    rows = [(step["name"], row) for step in report["steps"] for row in step["rows"] if "facts" not in row]
    shown = [(step, row) for step, row in rows if not row.get("passed")]
    width = max((len(row["name"]) for _, row in shown), default=0)
    table = []
    for step in report["steps"]:
        passed = sum(row.get("passed") is True for row in step["rows"])
        table.append(f"{step['name']}: {step['outcome']}; {passed} checks passed")
        for row in (row for of, row in shown if of == step["name"]):
            table.append(f"  {row['name']:{width}} {told(row)}")
    return table


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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true", help="toy sizes on the CPU; measures nothing")
    parser.add_argument("--only", action="append", metavar="STEP", help="this step; may be given again")
    parser.add_argument("--peer", metavar="PYTHON", help="a Python that has torch and spikingjelly 2.0.0")
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    parser.add_argument("--budget", type=float, default=600.0, metavar="SECONDS", help="for all steps; 600")
    parser.add_argument("--list", action="store_true", help="name the steps and end")
    given = parser.parse_args(arguments)
    if given.list:
        print("\n".join(f"{step.name:12} {step.says}" for step in STEPS))
        return 0
    names = [step.name for step in STEPS]
    wrong = next((name for name in given.only or () if name not in names), None)
    why = f"--only {wrong} is not a step; use one of {', '.join(names)}" if wrong else unusable(given.simulate)
    if why is None and not given.budget > 0:
        why = f"--budget {given.budget:g} is not allowed; use a number of seconds above 0"
    if why is not None:
        print(f"error: {why}", file=sys.stderr)
        return UNUSABLE
    return check(given)


def check(given: argparse.Namespace) -> int:
    """Runs the wanted steps after `environment`, which says what the machine is."""
    gpu, several = "simulated", ""
    if not given.simulate:
        import torch

        gpu, count = torch.cuda.get_device_name(0), torch.cuda.device_count()
        several = f" (cuda:0 of {count} GPUs; the others are not used)" if count > 1 else ""
    now = datetime.now()
    path = Path(given.json) if given.json else None if given.simulate else new_path(FOLDER, gpu, now)
    command = "python -m benchmarks.gpu_check " + " ".join(shlex.quote(word) for word in sys.argv[1:])
    report = Report(path, {"gpu": gpu, "date": now.isoformat(timespec="seconds"), "command": command.strip()})
    if given.simulate:
        report.content["simulated"] = True
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        report.write()
    except OSError as error:
        print(f"error: {path} cannot be written ({error.strerror}); name another file with --json", file=sys.stderr)
        return UNUSABLE
    print(f"checking {'this command, on the CPU' if given.simulate else gpu}{several}", flush=True)
    wanted = [step for step in STEPS if not given.only or step.name in (*given.only, "environment")]
    interrupted = False
    try:
        runner.run(
            wanted,
            report,
            simulated=given.simulate,
            options={"peer": given.peer},
            budget_s=given.budget,
            say=lambda text: print(text, flush=True),
        )
    except KeyboardInterrupt:
        interrupted = True
        report.content["interrupted"] = True
        report.write()
    print("\n".join(lines(report.content)))
    if path is not None:
        print(f"results: {os.path.relpath(path)}")
    return 130 if interrupted else 1 if report.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
