"""Copies between host and device for which the host does not wait.

A read (`.item()`, `.tolist()`) waits for all queued kernels; so does making a device tensor from Python numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class AsyncRead:
    """A small tensor of every step, which the host reads one step later: by then the copy is done.

    Args:
        like: shape, dtype and device of the tensors. Before the first `late`, the values are zeros.
    """

    def __init__(self, like: Tensor) -> None:
        on_gpu = like.is_cuda
        self._steps = [0, 0]
        self._hosts = [torch.zeros(like.shape, dtype=like.dtype, pin_memory=on_gpu) for _ in range(2)]
        self._arrived = [torch.cuda.Event() for _ in range(2)] if on_gpu else []
        self._turn = 0

    def late(self, step: int, newest: Tensor) -> tuple[int, list]:
        """Starts the copy of `newest`, of `step`; returns the step and values of the tensor that was sent before it."""
        self._turn ^= 1
        self._steps[self._turn] = step
        self._hosts[self._turn].copy_(newest, non_blocking=True)
        if self._arrived:
            self._arrived[self._turn].record()
        return self._values(self._turn ^ 1)

    def newest(self) -> tuple[int, list]:
        """Step and values of the tensor that was sent last; the host waits for its copy."""
        return self._values(self._turn)

    def _values(self, turn: int) -> tuple[int, list]:
        if self._arrived:
            self._arrived[turn].synchronize()
        return self._steps[turn], self._hosts[turn].tolist()


class Constants:
    """Python numbers as a tensor on the device, made once for each of the last `MOST` different ones.

    They are copied from pinned memory, so the host does not wait even then.
    """

    MOST = 64

    def __init__(self, device: torch.device) -> None:
        self._device, self._made = device, {}

    def __call__(self, values: Sequence[int]) -> Tensor:
        """The `n` values as `(n,)` int64 on the device; do not write to it."""
        key = tuple(values)
        if key not in self._made:
            if len(self._made) >= self.MOST:
                self._made.pop(next(iter(self._made)))
            host = torch.tensor(key, dtype=torch.int64, pin_memory=self._device.type == "cuda")
            self._made[key] = host.to(self._device, non_blocking=True)
        return self._made[key]
