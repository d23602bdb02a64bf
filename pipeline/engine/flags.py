"""Flags that the ranks exchange with every step, and what follows from them, at the same step on all ranks.

Three numbers travel with the step's all-reduce (chi/tap.py): a request to stop, the count of bad samples, a checkpoint
that could not be written. They are read a step later, when they have arrived, so no rank waits for them.
"""

import torch
from torch import Tensor

from pipeline.chi.async_read import AsyncRead
from pipeline.chi.tap import FLAGS, Reading
from pipeline.data.loader import Loader
from pipeline.run_dir.checkpoint_writer import Writer

STOP, BAD_SAMPLES, UNSAVED = range(len(FLAGS))


class Flags:
    """This rank's flags, and those of all ranks once they have arrived.

    Args:
        own: this rank's numbers, `(len(FLAGS),)` int64, which the tap sends with every step.
        loader: counts bad samples, and says how many are too many.
        world_size: number of ranks.
    """

    def __init__(self, own: Tensor, loader: Loader, world_size: int) -> None:
        self._own, self._loader, self._world_size = own, loader, world_size
        self._later = AsyncRead(own)

    def ask_to_stop(self) -> None:
        """Asks all ranks to stop within two steps, with a checkpoint; from any thread."""
        self._own[STOP] = 1

    def report_unsaved(self) -> None:
        """Tells all ranks that a checkpoint could not be written; from any thread."""
        self._own[UNSAVED] = 1

    def count_bad_samples(self) -> None:
        """Call it before a step's last backward pass: notes how many samples this rank's loader has replaced."""
        self._own[BAD_SAMPLES].fill_(self._loader.bad.count)  # an assignment would make a tensor of the number

    def after(self, step: int, reading: Reading, writer: Writer, *, wait: bool) -> bool:
        """Whether to stop after `step`; the same on every rank.

        Args:
            step: the step just made.
            reading: of this step, over all ranks.
            writer: of checkpoints.
            wait: use the flags of this step, not the one before, since the host waits for the device anyway.

        Raises:
            DataError: too many samples were bad; the message has their names, from all ranks.
            CheckpointError: rank 0 could not write a checkpoint.
        """
        told_at, told = self._later.late(step, reading.flags)
        if wait or told[STOP]:
            told_at, told = self._later.newest()
        self._loader.account(told[BAD_SAMPLES], told_at)
        if self._loader.too_many_bad:
            reasons: list = [None] * self._world_size
            torch.distributed.all_gather_object(reasons, self._loader.bad.reasons)
            self._loader.refuse_bad({name: reason for part in reasons for name, reason in part.items()})
        if told[UNSAVED]:
            writer.raise_failure()
        return bool(told[STOP])
