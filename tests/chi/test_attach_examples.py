"""The example scripts of docs/: they run, their marked lines are all that χ takes, and a resumed one is bit for bit."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import peers

ROOT = Path(__file__).parents[2]
STEPS = {"plain": (300, 85), "snntorch": (300, 80), "spikingjelly": (14, 0)}
"""Steps to run in a test, and the accuracy in percent to reach."""


def run(script: Path, *arguments: object) -> str:
    """The script's output; SpikingJelly is imported first, with what it needs of torchvision."""
    code = (
        "import runpy, sys; from tests.support import peers; peers.spikingjelly(); "
        "sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(script), *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def example(kind: str) -> Path:
    if kind == "snntorch":
        peers.snntorch()
    peers.spikingjelly()
    return ROOT / f"docs/attach_{kind}.py"


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.faults if kind == "spikingjelly" else ()) for kind in STEPS]
)
def test_an_example_learns_and_goes_on_bit_for_bit(kind, tmp_path):
    steps, wanted = STEPS[kind]
    script = example(kind)
    whole = run(script, "--steps", steps)
    accuracy = re.search(r"accuracy ([\d.]+) %", whole)
    assert accuracy is not None
    assert float(accuracy[1]) >= wanted
    part = run(script, "--steps", steps // 2, "--checkpoint", tmp_path / "part.pt")
    rest = run(script, "--steps", steps, "--checkpoint", tmp_path / "part.pt")
    losses = [line for line in (part + rest).splitlines() if line.startswith("step")]
    assert losses == [line for line in whole.splitlines() if line.startswith("step")]
    assert rest.splitlines()[-2:] == whole.splitlines()[-2:], "accuracy, widths and coverage"


@pytest.mark.parametrize("kind", STEPS)
def test_without_the_marked_lines_it_is_a_script_without_chi(kind, tmp_path):
    lines = example(kind).read_text().splitlines()
    kept = [line for line in lines if "# ←" not in line]
    assert len(lines) - len(kept) <= 6
    assert len(lines) <= 100
    code = "\n".join(line for line in kept if not line.startswith('"""χ'))
    assert "chi" not in code.replace("scikit", "")
    (tmp_path / "without.py").write_text("\n".join(kept))
    assert "accuracy" in run(tmp_path / "without.py", "--steps", 3)
