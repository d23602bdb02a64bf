"""Checks that all ranks hold the same parameters: every update relies on it, and no error shows a difference.

The checksum of a parameter tensor is the sum of its bits as integers, in int64, so it is exact in any order. The check
costs one all-reduce of 16 bytes per parameter tensor; the weights are read once.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import DivergedError


class ReplicaCheck:
    """Compares the ranks' parameters every `every` steps; 0 never does. ZeRO-3 has no replicas: nothing is compared."""

    def __init__(self, engine, every: int) -> None:
        self._named = list(engine.module.named_parameters())
        alone = dist.get_world_size() == 1 or engine.zero_optimization_stage() == 3
        self._every = 0 if alone else every

    def after_step(self, step: int) -> None:
        """Calls `compare` after every `every`-th step."""
        if self._every and step % self._every == 0:
            self.compare(step)

    @torch.no_grad()
    def compare(self, step: int) -> None:
        """Compares now. Every rank calls it, also before a save, so that no differing parameters are saved.

        Raises:
            DivergedError: the same on every rank, naming the ranks that differ and the first parameter.
        """
        if not self._every:
            return
        sums = torch.stack([_checksum(parameter) for _, parameter in self._named])
        both = torch.cat((sums, -sums))
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        largest, smallest = both[: len(sums)], -both[len(sums) :]
        different = (largest != smallest).nonzero().flatten().tolist()
        if different:
            raise DivergedError(self._who(step, sums, different))

    def _who(self, step: int, sums: Tensor, different: list[int]) -> str:
        of_ranks = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
        dist.all_gather(of_ranks, sums)
        first = torch.stack(of_ranks)[:, different[0]].tolist()
        usual = max(first, key=first.count)
        if first.count(usual) * 2 > len(first):
            ranks = [rank for rank, value in enumerate(first) if value != usual]
            who = f"rank {', '.join(map(str, ranks))} differs from the others"
        else:
            who = f"ranks {', '.join(map(str, range(len(first))))} differ, and no majority says which is right"
        name, more = self._named[different[0]][0], len(different) - 1
        return (
            f"after step {step} {who} in {name} and {more} more parameters: a fault of memory, of a device or of the "
            "network; look for it there, and run again to go on from the newest checkpoint"
        )


def _checksum(parameter: Tensor) -> Tensor:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    return parameter.detach().contiguous().view(bits).sum(dtype=torch.int64)
