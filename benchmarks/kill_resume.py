"""Kill-and-resume cycles: SIGKILL to all processes of a job at random moments; final weights must be the same bits.

    python -m benchmarks.kill_resume [--cycles N] [--seed N] [--json FILE] [--quick]

A small network learns the digits on two CPU ranks through the real launcher. The first run is not disturbed. Later runs
are killed again and again, in start-up, steps, saves and evaluations, until each is complete. Their results must equal
those of the first: parameters, momentum, widths, every step's loss. A last run is stopped with SIGTERM and started
again; its lines show which steps it repeats. With --json the cycles of earlier calls in FILE are kept and added to, so
that many cycles can be split over several calls; each call needs another --seed.
"""

import argparse
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from benchmarks import table
from benchmarks.table import row
from pipeline.data.manifest import Manifest
from pipeline.errors import EXIT_DONE, EXIT_STOPPED
from pipeline.metrics.journal import read_journal
from pipeline.run_dir.checkpoint_files import load_newest
from tests.conftest import kill, launch, start

STEPS = 40


def words(data: Path, run_dir: Path) -> list[str]:
    num_samples = Manifest.load(data / "train").num_samples
    settings = {
        "--recipe": "digits",
        "--data.path": data,
        "--run_dir": run_dir,
        "--train.epochs": (STEPS - 0.5) * 128 / num_samples,
        "--train.eval_every_epochs": 1,
        "--train.log_every": 1,
        "--train.checkpoint_every": 3,
        "--chi.interval": 2,
        "--metrics.port": 0,
    }
    return [str(word) for pair in settings.items() for word in pair]


def left(run_dir: Path) -> dict:
    """All results of a run, which must be the same."""
    state = load_newest(run_dir)
    assert state is not None
    records = [r for r in read_journal(run_dir / "metrics.jsonl") if "train_loss" in r]
    tensors = {f"parameter {name}": t for name, t in state["model"]["parameters"].items()}
    tensors |= {f"buffer {name}": t for name, t in state["model"]["buffers"].items()}
    for slot, of in state["model"]["optimizer"].items():
        tensors |= {f"{slot} {name}": t for name, t in of.items()}
    tensors["widths"] = state["widths"]["log_width"]
    return {"tensors": tensors, "losses": [(r["step"], r["train_loss"]) for r in records]}


def differences(ours: dict, theirs: dict) -> list[str]:
    names = [name for name, t in theirs["tensors"].items() if not torch.equal(ours["tensors"][name], t)]
    return names + (["losses"] if ours["losses"] != theirs["losses"] else [])


class Job:
    """A started job whose lines are read as they come."""

    def __init__(self, data: Path, run_dir: Path) -> None:
        self.began = time.monotonic()
        self.process = start("launch/train.py", *words(data, run_dir))
        self.steps: list[tuple[int, float]] = []
        self.stepped = threading.Event()
        self.output = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.output += line
            if match := re.match(r"step +(\d+)/", line):
                self.steps.append((int(match[1]), time.monotonic()))
                self.stepped.set()
        self.stepped.set()

    def killed_after(self, seconds: float, *, of_steps: bool) -> bool:
        """Kills all processes `seconds` after the start, or after the first step; False if the job ended before."""
        if of_steps:
            self.stepped.wait()
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            kill(self.process)
            self._reader.join()
            return True
        self._reader.join()
        if self.process.returncode != EXIT_DONE:
            raise SystemExit(f"the job ended with {self.process.returncode}:\n{self.output}")
        return False


def cycles(data: Path, scratch: Path, count: int, seed: int) -> tuple[int, list[float], int, list[str]]:
    """Kills at least `count` times. Returns kills, seconds from each to the next step, complete runs, differences."""
    straight = scratch / "straight"
    ended = launch("launch/train.py", *words(data, straight))
    assert ended.returncode == EXIT_DONE, ended.output
    expected = left(straight)
    draw = random.Random(seed)
    kills, finished, restarts, wrong = 0, 0, [], []
    while kills < count:
        run_dir, killed_at = scratch / f"run-{finished}", None
        while True:
            job = Job(data, run_dir)
            of_steps = draw.random() < 0.8
            killed = job.killed_after(draw.uniform(0, 5.0 if of_steps else 8.0), of_steps=of_steps)
            if killed_at is not None and job.steps:
                restarts.append(job.steps[0][1] - killed_at)
            if not killed:
                break
            kills, killed_at = kills + 1, time.monotonic()
            print(f"kill {kills} after step {job.steps[-1][0] if job.steps else 'none'}", flush=True)
        finished += 1
        found = differences(left(run_dir), expected)
        wrong += found
        print(f"run {finished} at its end: {found or 'the same, bit for bit'}", flush=True)
    return kills, restarts, finished, wrong


def repeated_after_stop(data: Path, run_dir: Path) -> int:
    """Number of steps that a run repeats after SIGTERM in the middle and a new start."""
    job = Job(data, run_dir)
    job.stepped.wait()
    time.sleep(1)
    below = psutil.Process(job.process.pid).children(recursive=True)
    next(process for process in below if process.environ().get("RANK") == "1").send_signal(signal.SIGTERM)
    code = job.process.wait(timeout=120)
    assert code == EXIT_STOPPED, job.output
    again = Job(data, run_dir)
    again.process.wait(timeout=200)
    return job.steps[-1][0] + 1 - again.steps[0][0]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cycles", type=int, default=20, help="kills to make")
    parser.add_argument("--seed", type=int, default=0, help="for the moments of the kills")
    parser.add_argument("--quick", action="store_true", help="two kills")
    parser.add_argument("--json", metavar="FILE", help="add to the figures here")
    arguments = parser.parse_args()
    before = json.loads(Path(arguments.json).read_text()) if arguments.json and Path(arguments.json).exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch, "digits")
        subprocess.run([sys.executable, "-m", "data_prep", "digits", str(data)], check=True)
        least = 2 if arguments.quick else arguments.cycles
        count, restarts, finished, wrong = cycles(data, Path(scratch), least, arguments.seed)
        repeated = repeated_after_stop(data, Path(scratch, "stopped"))
    restarts = before.get("restarts_s", []) + restarts
    count, finished = count + before.get("kills", 0), finished + before.get("runs", 0)
    wrong, seeds = before.get("differing", []) + wrong, [*before.get("seeds", []), arguments.seed]
    rows = [
        row("kills at random moments", count, "", goal=50),
        row("runs that came to their end", finished, ""),
        row("tensors and losses that differ from the undisturbed run's", len(wrong), "", goal=0, better="lower"),
        row("from SIGKILL to the next step, median", statistics.median(restarts), "s", goal=15, better="lower"),
        row("from SIGKILL to the next step, longest", max(restarts), "s"),
        row("steps repeated after a requested stop", repeated, "", goal=0, better="lower"),
    ]
    table.show(rows)
    if arguments.json:
        table.write(
            arguments.json,
            rows,
            hardware=f"{table.processor()}, 2 cores; no GPU was at hand",
            versions={name: version(name) for name in ("torch", "deepspeed")},
            command=f"python -m benchmarks.kill_resume --cycles {arguments.cycles} --seed SEED, for each of seeds",
            setting=f"the digits recipe, {STEPS} steps, two CPU ranks, a checkpoint every 3 steps",
            kills=count,
            runs=finished,
            differing=wrong,
            seeds=seeds,
            restarts_s=[round(seconds, 2) for seconds in restarts],
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
