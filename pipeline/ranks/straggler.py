"""Finds stragglers: a rank that is slower than the others holds all of them up.

A step takes equally long on every rank, since all wait for the slowest in the all-reduce. So each rank measures its own
data wait and forward passes by the host's clock (on a GPU, the time to launch them). On logged steps the ranks exchange
these times by an asynchronous all-gather. It is read at the next logged step, so that no rank waits for it.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

SLOW, MARGIN_S = 3.0, 0.01
"""A rank is slow if its step takes more than SLOW times the others' median, and MARGIN_S seconds more than it."""


class Straggler:
    """Compares the ranks' times, and names a rank that is slow.

    Args:
        module: its forward passes in training are timed.
        every: steps between two exchanges.
        step: step that the run continues after; 0 for a new run.
        waited: returns the seconds that this rank has waited for data so far.
        say: prints a line, on rank 0.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        *,
        every: int,
        step: int,
        waited: Callable[[], float],
        say: Callable[[str], None],
    ) -> None:
        self._device, self._every, self._waited, self._say = device, every, waited, say
        self._step, self._began, self._forward_s, self._wait_s = step, 0.0, 0.0, 0.0
        self._slow: set[int] = set()
        self._work, self._gathered, self._sent = None, [], step
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)

    def after_step(self, step: int) -> None:
        """After every step, on every rank."""
        if step % self._every or dist.get_world_size() == 1:
            return
        self._report()
        wait_s = self._waited()
        mine = (self._forward_s + wait_s - self._wait_s) / (step - self._step)
        self._step, self._forward_s, self._wait_s, self._sent = step, 0.0, wait_s, step
        if dist.get_rank() != 0:
            print(f"step {step}: {1000 * mine:.1f} ms a step for data and forward passes", flush=True)  # into its log
        sent = torch.tensor([mine], dtype=torch.float32, device=self._device)
        self._gathered = [torch.zeros_like(sent) for _ in range(dist.get_world_size())]
        self._work = dist.all_gather(self._gathered, sent, async_op=True)

    def _before(self, module: nn.Module, _inputs) -> None:
        self._began = time.monotonic()

    def _after(self, module: nn.Module, _inputs, _output) -> None:
        if module.training and torch.is_grad_enabled():
            self._forward_s += time.monotonic() - self._began

    def _report(self) -> None:
        if self._work is None:
            return
        self._work.wait()
        seconds = torch.cat(self._gathered).tolist()
        for rank, spent in enumerate(seconds):
            usual = statistics.median(seconds[:rank] + seconds[rank + 1 :])
            slow = spent > SLOW * usual and spent > usual + MARGIN_S
            if slow and rank not in self._slow:
                self._say(
                    f"step {self._sent}: rank {rank} is slow and holds up the others: {1000 * spent:.0f} ms a step for "
                    f"data and forward passes, {spent / max(usual, 1e-9):.1f} times their {1000 * usual:.0f} ms"
                )
            elif not slow and rank in self._slow:
                self._say(f"step {self._sent}: rank {rank} is as fast as the others again")
            (self._slow.add if slow else self._slow.discard)(rank)
