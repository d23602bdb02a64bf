"""What passes between host and device without making the host wait for the device.

A read (`.item()`, `.tolist()`) waits for everything that is queued; so does a tensor that is made from Python numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class AsyncRead:
    """A small tensor of every step, read by the host a step later: by then it has come by itself.

    Args:
        like: shape, dtype and device of the tensors; before the first of them there were zeros.
    """

    def __init__(self, like: Tensor) -> None:
        on_gpu = like.is_cuda
        self._steps = [0, 0]
        self._hosts = [torch.zeros(like.shape, dtype=like.dtype, pin_memory=on_gpu) for _ in range(2)]
        self._arrived = [torch.cuda.Event() for _ in range(2)] if on_gpu else []
        self._turn = 0

    def late(self, step: int, newest: Tensor) -> tuple[int, list]:
        """Sends `newest`, of `step`, on its way, and gives the step and the values of the one before it."""
        self._turn ^= 1
        self._steps[self._turn] = step
        self._hosts[self._turn].copy_(newest, non_blocking=True)
        if self._arrived:
            self._arrived[self._turn].record()
        return self._values(self._turn ^ 1)

    def newest(self) -> tuple[int, list]:
        """Those of the one that was sent last; the host waits for it."""
        return self._values(self._turn)

    def _values(self, turn: int) -> tuple[int, list]:
        if self._arrived:
            self._arrived[turn].synchronize()
        return self._steps[turn], self._hosts[turn].tolist()


class Constants:
    """Numbers of the host as a tensor on the device, made anew only when they have changed."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._values, self._tensor = device, None, torch.empty(0)

    def __call__(self, values: Sequence[int]) -> Tensor:
        """`(n,)` int64."""
        if self._values != tuple(values):
            self._values = tuple(values)
            self._tensor = torch.tensor(self._values, dtype=torch.int64, device=self._device)
        return self._tensor
