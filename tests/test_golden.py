"""The same configuration gives the same losses, now and after every change; see golden.py for how to change them."""

import json
import subprocess
import sys

import pytest

from tests import golden
from tests.conftest import ROOT

# In doubles a sum in another order moves a loss by some 1e-14; widths and pixels are fp32, and move by 6e-8.
ROUNDING = 1e-6


def test_twenty_steps_in_doubles_give_the_committed_numbers(digits, tmp_path):
    kept, now = json.loads(golden.FILE.read_text(encoding="utf-8")), golden.run(digits, tmp_path)
    assert kept["reasons"], "numbers without a reason"
    for name, values in now.items():
        assert values == pytest.approx(kept[name], rel=ROUNDING), name
    assert sum(now["losses"][-5:]) < 0.97 * sum(now["losses"][:5]), "it learns"
    assert len(set(now["widths"])) > 1, "the widths were steered"
    command = [sys.executable, "-m", "launch.evaluate", str(tmp_path / "run"), "--json", str(tmp_path / "again.json")]
    subprocess.run(command, cwd=ROOT, check=True)
    assert json.loads((tmp_path / "again.json").read_text())["eval_loss"] == pytest.approx(
        now["evaluation"][-1], rel=1e-7
    )
