"""`chi.attach` on two and four ranks: DDP in its forms, FSDP2, and gradients that a script averages by itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (
            2,
            {
                "static graph": 0,
                "bucket views": 0,
                "small buckets": 0,
                "unused parameters": 0,
                "no_sync": 0,
                "a hook of its own": 1,
                "compiled inside": 1,
                "compiled outside": 1,
                "averaged by hand": 1,
                "FSDP2": 1,
            },
        ),
        pytest.param(
            4,
            {"DDP": 0, "groups of two": 0, "groups of two, averaged by hand": 1, "FSDP2": 1},
            marks=pytest.mark.faults,
        ),
    ],
)
def test_the_weights_are_those_without_it_and_the_numbers_those_of_all_ranks(ranks, settings):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "tests/chi/attach_ranks.py"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if "more collectives" in line]
    assert said == [f"{name}: {3 * more} more collectives in 3 steps" for name, more in settings.items()]
