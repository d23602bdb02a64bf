"""A model card's lines of Python, run as a reader would run them."""

import re
import subprocess
import sys
from pathlib import Path

import torch

from tests.conftest import ROOT


def run_the_lines(card: Path, first: str = "pass", **given: torch.Tensor) -> torch.Tensor:
    """The `logits` of the card's code block, run beside the weights, in a process of its own.

    Args:
        card: the model card.
        first: a line before all others.
        given: the tensor that the lines take, by its name in them: images or frames.
    """
    found = re.search(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    lines = found[1].strip().splitlines()
    assert len(lines) <= 6
    ((name, tensor),) = given.items()
    torch.save(tensor, card.parent / "given.pt")
    before = f"import torch; {name} = torch.load('given.pt')"
    after = "torch.save(torch.as_tensor(logits).detach(), 'logits.pt')"
    code = "\n".join([f"import sys; sys.path.insert(0, {str(ROOT)!r})", first, before, *lines, after])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=card.parent, timeout=300)
    return torch.load(card.parent / "logits.pt")
