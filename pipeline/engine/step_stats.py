"""What is measured around a step (`StepStats`), and what a loss or gradient that is not finite does (`NonFinite`).

Such a step is reported with its samples, and is skipped or ends the run.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.chi.tap import Reading, Tap
from pipeline.data.loader import Batch, Loader
from pipeline.engine.flags import Flags
from pipeline.errors import NonFiniteError

MAX_LISTED = 32


class Skipped(NamedTuple):
    """A step that was not finite and was skipped."""

    line: str
    samples: list[str]
    """Names of its samples."""


class NonFinite:
    """Judges each step, on every rank alike, since the reduced gradient is the same.

    The change that a skipped step's forward passes made to batch normalisation's running statistics is undone: one NaN
    would spoil them for good. So it is if the fp16 gradient overflowed: the forward pass may have overflowed too.
    """

    def __init__(
        self,
        module: nn.Module,
        loader: Loader,
        *,
        micro_batch: int,
        skips: int,
        fp16: bool,
        world_size: int,
    ) -> None:
        self._loader, self._micro_batch, self._skips, self._world_size = loader, micro_batch, skips, world_size
        self._seen: list[tuple[int, Tensor]] = []
        self.in_a_row = 0
        """Steps in a row, up to the last one, that were not finite."""
        self._buffers = [b for b in module.buffers() if b.is_floating_point()] if skips or fp16 else []
        self._before = [buffer.clone() for buffer in self._buffers]

    def state_dict(self) -> dict[str, int]:
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.in_a_row = state["in_a_row"]

    def begin(self) -> None:
        """Call it before each step: keeps a copy of what its forward passes change."""
        _copy(self._buffers, self._before)

    def observe(self, batch: Batch, loss: Tensor) -> None:
        """Call it for each micro-batch of this rank. Pixels count too: a NaN gives no spike, and may miss the loss."""
        self._seen.append((batch.position, loss.detach().float() + batch.images.sum(dtype=torch.float32)))

    def judge(self, step: int, reading: Reading) -> Skipped | None:
        """Call it after each step: returns what to report of one that was not finite, else None.

        Raises:
            NonFiniteError: more steps in a row than may be skipped were not finite.
        """
        seen, self._seen = self._seen, []
        if reading.skipped:
            _copy(self._before, self._buffers)
        if not reading.nonfinite:
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        parts: list = [None] * self._world_size
        mine = [(position, bool(torch.isfinite(value))) for position, value in seen]
        torch.distributed.all_gather_object(parts, mine)
        of_all = [position for part in parts for position, _ in part]
        suspects = [position for part in parts for position, finite in part if not finite]
        names = [name for at in suspects or of_all for name in self._loader.names(at, self._micro_batch)]
        what = f"step {step}: {reading.nonfinite}; {_listed(names, found=bool(suspects))}"
        if self.in_a_row > self._skips:
            before = f", the last of {self.in_a_row} such steps in a row" if self._skips else ""
            raise NonFiniteError(
                f"{what}{before}; no update was made from it. A lower optim.lr or another train.precision may mend "
                f"it; train.on_nonfinite='skip({max(3, 2 * self._skips)})' passes over such steps"
            )
        return Skipped(f"{what}; skipped, {self.in_a_row} of {self._skips} in a row", names)


def _copy(source: list[Tensor], to: list[Tensor]) -> None:
    for one, other in zip(source, to, strict=True):
        other.copy_(one)


def _listed(names: list[str], *, found: bool) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    where = "pixels or loss are not finite in" if found else "pixels and loss of all samples are finite:"
    return f"{where} the micro-batches of {', '.join(names[:MAX_LISTED])}{more}"


class StepStats:
    """What the training loop calls around each step.

    Args:
        tap: measures χ and its companions, loss and correct answers.
        nonfinite: judges the step.
        flags: the ranks exchange them with each step.
        seed: the run's.
    """

    def __init__(self, tap: Tap, nonfinite: NonFinite, flags: Flags, seed: int) -> None:
        self._tap, self._nonfinite, self._flags, self._seed = tap, nonfinite, flags, seed

    def begin(self, micro_batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yields the micro-batches of a step, after a copy of what their forward passes change.

        torch's random numbers (a dropout's) follow from the seed and the micro-batch's place in the stream alone: they
        are the same after a resume, and at every number of ranks.
        """
        self._nonfinite.begin()
        for batch in micro_batches:
            torch.manual_seed((self._seed * 0x9E3779B97F4A7C15 + batch.position) % 2**63)
            yield batch

    def observe(self, batch: Batch, loss: Tensor, logits: Tensor) -> None:
        """Call it between a micro-batch's forward and backward pass; logits `(T, N, K)`."""
        self._tap.observe(loss, logits, batch.labels)
        self._nonfinite.observe(batch, loss)
        self._flags.count_bad_samples()

    def check(self) -> None:
        """Call it between backward pass and update; raises what `Tap.check` raises."""
        self._tap.check()

    def reduce(self, step: int) -> Reading:
        """The reading of `step`; if it was skipped, `nonfinite` and `samples` say why.

        Raises:
            NonFiniteError: too many steps in a row were not finite.
        """
        reading = self._tap.read()
        skipped = self._nonfinite.judge(step, reading)
        return reading if skipped is None else replace(reading, nonfinite=skipped.line, samples=tuple(skipped.samples))
