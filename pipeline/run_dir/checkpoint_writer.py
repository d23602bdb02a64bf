"""Rank 0 writes checkpoints beside the training, one at a time; the other ranks only keep the account.

    begin(step, state)      waits for the one before, then returns at once: training goes on while a thread writes
    wait()                  until it is on the disk: before a stop, before the end, before it is marked as the best

Nothing is lost silently: what the thread fails with is told to all ranks by the next step's flags (`on_failure`),
and raised on rank 0 by the next call.
"""

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from pipeline.errors import CheckpointError, first_line
from pipeline.run_dir import checkpoint_files

log = logging.getLogger(__name__)


class Writer:
    """Args:
    run_dir: the run's folder.
    active: on rank 0.
    keep: of the newest, so many stay.
    step: that the run goes on after; its checkpoint is there.
    best: accuracy of the best checkpoint up to there, in [0, 1]; -1 where there is none. The same on every rank.
    on_failure: called in the thread when a checkpoint could not be written.
    on_saved: called in the thread with the step and the seconds that it took.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        active: bool,
        keep: int,
        step: int,
        best: float,
        on_failure: Callable[[], None],
        on_saved: Callable[[int, float], None],
    ) -> None:
        self._run_dir, self._root, self._active, self._keep = run_dir, run_dir / "checkpoints", active, keep
        self._on_failure, self._on_saved = on_failure, on_saved
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self.last_step = step
        """The step of the newest checkpoint that was begun, on every rank."""
        self.best = best
        """Accuracy of the best checkpoint, in [0, 1]; -1 before there is one."""
        if active:
            checkpoint_files.sweep(run_dir)

    def begin(self, step: int, state: dict) -> None:
        """Starts to write `state`, whose tensors nobody may change from now on.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.wait()
        self.last_step = step
        if self._active:
            self._thread = threading.Thread(target=self._write, args=(step, state), name="checkpoint")
            self._thread.start()

    def wait(self) -> None:
        """Until the last checkpoint is on the disk.

        Raises:
            CheckpointError: it could not be written; on rank 0.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def raise_failure(self) -> NoReturn:
        """On every rank, when the flags say that rank 0 could not write: its CheckpointError, or one about it."""
        self.wait()
        raise CheckpointError("rank 0 could not write a checkpoint; its own line says why")

    def mark_best(self, step: int, accuracy: float) -> None:
        """Keeps the checkpoint after `step`, the last that was begun, until a better one comes."""
        assert step == self.last_step
        self.wait()
        self.best = accuracy
        if self._active:
            checkpoint_files.mark_best(self._run_dir, step, accuracy)

    def close(self) -> None:
        """Lets the thread end, also where the run ends with an error of its own."""
        if self._thread is not None:
            self._thread.join()
            if self._error is not None:
                log.error("%s", self._error)

    def _write(self, step: int, state: dict) -> None:
        began = time.monotonic()
        self._error = self._failure(step, "it broke off")  # until it is saved, so that no way out is taken for one
        try:
            checkpoint_files.save(self._run_dir, step, state, keep=self._keep)
            self._error = None
        except Exception as error:  # of torch's archive too, which has errors of its own
            self._error = self._failure(step, getattr(error, "strerror", None) or first_line(error))
        finally:
            if self._error is None:
                self._on_saved(step, time.monotonic() - began)
            else:
                self._on_failure()
                shutil.rmtree(checkpoint_files.temporary(self._root, step), ignore_errors=True)

    def _failure(self, step: int, reason: str) -> CheckpointError:
        with contextlib.suppress(OSError):  # of a disk that is gone
            reason += f"; {shutil.disk_usage(self._run_dir).free / 1e6:.0f} MB are free"
        return CheckpointError(
            f"the checkpoint after step {step} could not be written to {self._root} ({reason}); the one before it is "
            "whole: make room, and run again to go on from it"
        )
