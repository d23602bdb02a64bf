"""What tests of spiking layers share: counters, a check for the CPU twin, and memory that shows unwritten parts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.snn.kernels import compiled
from pipeline.snn.kernels.tally import COUNTED, Tally


class Counts(Tally):
    """A tally whose counts can be read one by one."""

    neuron_steps, spikes, covered, grad_sq = (
        property(lambda self, at=at: self.counts[at]) for at, _ in enumerate(COUNTED)
    )


def new_tally() -> Counts:
    return Counts()


def require_compiler() -> None:
    if compiled.library(torch.zeros(1)) is None:
        pytest.skip(f"compiling does not work here: {compiled.why_not()}")


def run_in_interpreter(cases: Path, **variables: str) -> None:
    """Runs a file of tests in a process of its own, in Triton's interpreter; none may be skipped."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1", **variables},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on torch's uninitialised tensors hold NaN, and 171 where they hold integers."""

    def filled(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor if tensor.is_meta else tensor.fill_(float("nan") if tensor.is_floating_point() else 0xAB)

        return made

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))
