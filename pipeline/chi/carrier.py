"""What both carriers of χ share: which gradients are counted, what travels, and the check against DeepSpeed.

A carrier reads the reduced gradient on its way to the optimizer and brings every rank's counters to all of them:

    bucket.py      ZeRO-0 and 1, fp32 buckets: the counters are a tail of the gradient's own all-reduce
    partition.py   ZeRO-2 and 3, and fp16 at any stage: one small all-reduce when the optimizer steps
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn


class TapError(RuntimeError):
    """The tap and DeepSpeed disagree about the reduced gradient: χ would be wrong, so nothing is trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one rank saw during a step."""

    counts: Tensor
    """`(n,)` int64, each in [0, 2**36)."""
    floats: Tensor
    """`(k,)` float32, whatever else is summed over ranks; k stays the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Total:
    """What all ranks saw during a step, the same on each."""

    sums: Tensor
    """`(L, 3)` float64, `indicator.gradient_sums` of the layers' weights."""
    nnz: Tensor
    """0-d float64, non-zero gradients over all trainable parameters."""
    counts: Tensor
    """`(n,)` int64."""
    floats: Tensor
    """`(k,)` float64."""
    skipped: bool = False
    """No update was made: `sums` and `nnz` are NaN."""
    nonfinite: str = ""
    """Why, where it was not the overflow that fp16's loss scale adapts to; what is not finite, for a message."""


class Watched:
    """The trainable parameters of a network, P of them, and which are the weights of its L spiking layers."""

    def __init__(self, module: nn.Module, weights: Sequence[nn.Parameter]) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self.device = self.parameters[0].device
        self._rows = {id(p): row for row, p in enumerate(self.parameters)}
        self.layers = torch.tensor(self.rows(weights), device=self.device)
        """`(L,)` rows of the layers' weights."""
        self.numel = torch.tensor([numel(p) for p in self.parameters], device=self.device)
        """`(P,)` elements of every parameter."""

    def rows(self, parameters: Sequence[nn.Parameter]) -> list[int]:
        """Where these parameters stand among all."""
        return [self._rows[id(p)] for p in parameters]

    def zeros(self) -> Tensor:
        """`(P, 3)` float64 for the sums of every parameter."""
        return torch.zeros(len(self.parameters), 3, dtype=torch.float64, device=self.device)

    def full_counts(self) -> Tensor:
        """`(P,)` float64, non-zero gradients by DeepSpeed's public API; between backward and step, on every rank.

        One collective for every parameter: for the check at the start only.
        """
        counts = torch.zeros(len(self.parameters), dtype=torch.float64, device=self.device)
        for row, parameter in enumerate(self.parameters):
            full = safe_get_full_grad(parameter)
            if full is not None:
                counts[row] = torch.count_nonzero(full)
        return counts

    def compare(self, seen: Tensor, expected: Tensor) -> None:
        """Raises TapError, the same on every rank, where the counts `(P,)` differ."""
        different = (seen != expected).nonzero().flatten().tolist()
        if different:
            row = different[0]
            raise TapError(
                f"χ's self-check failed: {self.names[row]} has {expected[row].item():.0f} non-zero gradients by "
                f"DeepSpeed's full gradient and {seen[row].item():.0f} by the tap; use the DeepSpeed version of "
                "constraints.txt"
            )


def numel(parameter: nn.Parameter) -> int:
    """Elements of a whole parameter; ZeRO-3 leaves an empty tensor in its place."""
    return getattr(parameter, "ds_numel", parameter.numel())
