"""A short run of the digits by the real launcher, shared by several test files; none of them changes it."""

import re
import subprocess
import urllib.request
from pathlib import Path
from typing import NamedTuple

import psutil

from pipeline.data.manifest import Manifest
from pipeline.errors import EXIT_DONE
from tests.conftest import start

STEPS = 14


def arguments(digits: Path, run_dir: Path) -> list[str]:
    # Half a batch short of STEPS, since the number of steps is rounded up.
    epochs = (STEPS - 0.5) * 128 / Manifest.load(digits / "train").num_samples
    settings = {
        "--recipe": "digits",
        "--data.path": digits,
        "--run_dir": run_dir,
        "--train.epochs": epochs,
        "--train.log_every": 1,
        "--data.image_size_start": 8,  # the images grow between steps 12 and 13, where the second epoch begins
        "--data.image_size_ramp": "0,1",
        "--data.image_size_step": 8,
        "--train.checkpoint_every": 5,
        "--train.ema_decay": 0.5,
        "--chi.interval": 2,
        "--chi.calibrate": "true",
        "--metrics.port": 0,
    }
    return [str(word) for pair in settings.items() for word in pair]


class Finished(NamedTuple):
    run_dir: Path
    output: str
    scraped: str


def read_until(process: subprocess.Popen[str], pattern: str) -> tuple[str, re.Match]:
    """Reads the launcher's output up to the first line that matches; fails with the output when it ends before."""
    seen = ""
    assert process.stdout
    for line in process.stdout:
        seen += line
        if match := re.search(pattern, line):
            return seen, match
    raise AssertionError(f"the job ended before {pattern!r}:\n{seen}")


def rank_of(process: subprocess.Popen, rank: int) -> psutil.Process:
    """The process of a rank below the launcher."""
    below = psutil.Process(process.pid).children(recursive=True)
    (found,) = (p for p in below if p.environ().get("RANK") == str(rank))
    return found


def run_and_scrape(digits: Path, run_dir: Path) -> Finished:
    """A run that nothing disturbs, scraped over HTTP in its middle."""
    process = start("launch/train.py", *arguments(digits, run_dir))
    beginning, address = read_until(process, r"metrics at (http://\S+)")
    middle, _ = read_until(process, r"^step +4/")
    with urllib.request.urlopen(address[1], timeout=10) as response:
        scraped = response.read().decode()
    rest, _ = process.communicate(timeout=200)
    output = beginning + middle + rest
    assert process.returncode == EXIT_DONE, output
    return Finished(run_dir, output, scraped)
