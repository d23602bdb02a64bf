"""Long sequences in chunks of `CHUNK` time steps, because the twins hold the potentials of a few steps only.

A chunk starts from the last potentials of the chunk before it. Between the passes only these potentials are kept in
addition to what a short sequence keeps: 4 bytes a neuron for every `CHUNK` steps. The backward pass runs from the last
chunk to the first, passes on the gradient of the potential, and recomputes the potentials within each chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pipeline.snn.kernels.dispatch import Call

CHUNK = 16
"""Most steps of one call of a twin: their potentials fit in a GPU's registers, or in the first-level cache."""


def in_chunks(call: "Call") -> "Call | Chunks":
    """The call itself if it is short, else one that runs it in chunks."""
    return call if call.num_steps <= CHUNK else Chunks(call)


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """A call of more than `CHUNK` steps, with the interface of `compiled.Call`."""

    whole: "Call"
    """The call for all steps, whose settings every chunk shares."""
    states: list[torch.Tensor] = field(default_factory=list)
    """Potentials before every chunk but the first, (M,) fp32; kept from the forward pass for the backward pass."""

    @property
    def num_steps(self) -> int:
        return self.whole.num_steps

    @property
    def static(self) -> bool:
        return self.whole.static

    def _parts(self) -> "Iterator[tuple[Call, slice]]":
        """The call and the steps of each chunk, in order of time."""
        for start in range(0, self.num_steps, CHUNK):
            steps = slice(start, min(start + CHUNK, self.num_steps))
            yield replace(self.whole, num_steps=steps.stop - start), steps

    def forward(self, x, scale, shift, shortcut, v, want_state: bool):
        """As `compiled.Call.forward`."""
        out = x.new_empty((self.num_steps, *x.shape[1:]))
        rows, added = self._rows(out), None if shortcut is None else self._rows(shortcut)
        self.states.clear()
        for part, steps in self._parts():
            last = steps.stop == self.num_steps
            add = None if added is None else added[steps]
            _, v = part.forward(self._of(x, steps), scale, shift, add, v, want_state or not last, rows[steps])
            if not last and v is not None:
                self.states.append(v)
        return out, v if want_state else None

    def backward(self, grad_s, grad_last, x, scale, shift, mean, v, counted: bool):
        """As `compiled.Call.backward`. The chunks' gradients for a static current are summed in fp32."""
        grads, leaks, sums, counts = self._rows(grad_s), [], [], []
        grad_x = torch.zeros_like(x, dtype=torch.float32) if self.static else torch.empty_like(x)
        for (part, steps), before in zip(reversed(list(self._parts())), [*reversed(self.states), v], strict=True):
            into = None if self.static else grad_x[steps]
            part_x, grad_last, *of_part = part.backward(
                grads[steps], grad_last, self._of(x, steps), scale, shift, mean, before, counted, into
            )
            if self.static:
                grad_x += part_x
            leaks.append(of_part[0])
            sums.append(of_part[1])
            counts.append(of_part[2])
        grad_leak = None if self.whole.leak is None else sum(leaks)
        sums = (None, None) if scale is None else sum(sums)
        return grad_x.to(x.dtype), grad_last, grad_leak, sums, sum(counts) if counted else None

    def _of(self, x: torch.Tensor, steps: slice) -> torch.Tensor:
        return x if self.static else x[steps]

    def _rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """(T N, ...) or (T, ...), dense, as (T, M); a view."""
        return tensor.view(self.num_steps, -1)

    def statistics(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.whole.statistics(y)

    def affine(self, *tensors: torch.Tensor) -> None:
        self.whole.affine(*tensors)
