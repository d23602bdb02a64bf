"""What one optimizer step measures, from its first micro-batch to a reading that is the same on every rank."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import Tensor

from pipeline.chi.allreduce import Reading, Tap
from pipeline.data.loader import Batch
from pipeline.flags import Flags
from pipeline.nonfinite import NonFinite


class StepStats:
    """Args:
    tap: χ and its companions, loss and hits.
    nonfinite: judges the step.
    flags: travel along.
    """

    def __init__(self, tap: Tap, nonfinite: NonFinite, flags: Flags) -> None:
        self._tap, self._nonfinite, self._flags = tap, nonfinite, flags

    def begin(self, micro_batches: Iterable[Batch]) -> Iterator[Batch]:
        """The micro-batches of a step, after what their forward passes change has been kept."""
        self._nonfinite.begin()
        yield from micro_batches

    def observe(self, batch: Batch, loss: Tensor, logits: Tensor) -> None:
        """Between a micro-batch's forward and backward pass; logits `(T, N, K)`."""
        self._tap.observe(loss, logits, batch.labels)
        self._nonfinite.observe(batch, loss)
        self._flags.count_bad_samples()

    def check(self) -> None:
        """Between backward pass and update; raises as `Tap.check`."""
        self._tap.check()

    def reduce(self, step: int) -> Reading:
        """The reading of `step`; one that was passed over says so in `nonfinite`, with its `samples`.

        Raises:
            NonFiniteError: too many steps in a row were not finite.
        """
        reading = self._tap.read()
        skipped = self._nonfinite.judge(step, reading)
        return reading if skipped is None else replace(reading, nonfinite=skipped.line, samples=tuple(skipped.samples))
