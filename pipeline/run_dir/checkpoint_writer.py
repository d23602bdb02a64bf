"""Rank 0 writes checkpoints in a thread, one at a time, while training goes on; other ranks only note the steps.

    begin(step, state)      waits for the previous one, then returns at once: training goes on while a thread writes
    wait()                  until it is on the disk: before a stop, before the end, before it is marked as the best

No failure is silent: the next step's flags tell all ranks of it (`on_failure`), and the next call raises it on rank 0.
"""

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from pipeline.errors import CheckpointError, ConfigError, StoreError, first_line
from pipeline.run_dir import checkpoint_files, locks, outages

log = logging.getLogger(__name__)


class Writer:
    """Writes the checkpoints of a run.

    Args:
        run_dir: the run's folder.
        active: whether this is rank 0, which writes.
        keep: number of newest checkpoints to keep.
        step: step that the run continues after, whose checkpoint exists; 0 for a new run.
        best: accuracy of the best checkpoint up to `step`, in [0, 1]; -1 if there is none. The same on every rank.
        on_failure: called in the thread when a checkpoint could not be written.
        on_saved: called in the thread with the step and the seconds that the save took.
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
        self._error: CheckpointError | ConfigError | None = None
        self.last_step = step
        """The step of the newest checkpoint that was begun, on every rank."""
        self.best = best
        """Accuracy of the best checkpoint, in [0, 1]; -1 before there is one."""
        if active:
            self._watch = outages.outlast(lambda: locks.Watch(run_dir), str(run_dir))
            outages.outlast(lambda: checkpoint_files.sweep(run_dir), str(self._root), was_writable=True)

    def begin(self, step: int, state: dict) -> None:
        """Starts to write `state`; its tensors must not change from now on.

        Raises:
            CheckpointError: the previous one could not be written.
        """
        self.wait()
        self.last_step = step
        if self._active:
            self._thread = threading.Thread(target=self._write, args=(step, state), name="checkpoint")
            self._thread.start()

    def wait(self) -> None:
        """Returns when the last checkpoint is on the disk.

        Raises:
            CheckpointError: on rank 0, where it could not be written.
            ConfigError: on rank 0, where an earlier run uses the folder too.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def raise_failure(self) -> NoReturn:
        """Raises CheckpointError on every rank, when the flags say that rank 0 could not write a checkpoint."""
        self.wait()
        raise CheckpointError("rank 0 could not write a checkpoint; its own line says why")

    def mark_best(self, step: int, accuracy: float) -> None:
        """Keeps the checkpoint after `step`, the last one begun, until a better one comes."""
        assert step == self.last_step
        self.wait()
        self.best = accuracy
        if self._active:
            checkpoint_files.mark_best(self._run_dir, step, accuracy)

    def close(self) -> None:
        """Waits for the thread to end, also if the run ends with another error."""
        if self._thread is not None:
            self._thread.join()
            if self._error is not None:
                log.error("%s", self._error)

    def _write(self, step: int, state: dict) -> None:
        began = time.monotonic()
        self._error = self._failure(step, "it broke off")  # cleared once saved, so that no exit looks like a success
        try:
            outages.outlast(lambda: self._save(step, state), str(self._root), was_writable=True)
            self._error = None
        except ConfigError as error:
            self._error = error
        except StoreError as error:
            self._error = CheckpointError(f"the checkpoint after step {step} could not be written: {error}")
        except Exception as error:  # torch's archive writer has errors of its own
            self._error = self._failure(step, getattr(error, "strerror", None) or first_line(error))
        finally:
            if self._error is None:
                self._on_saved(step, time.monotonic() - began)
            else:
                self._on_failure()
                shutil.rmtree(checkpoint_files.temporary(self._root, step), ignore_errors=True)

    def _save(self, step: int, state: dict) -> None:
        self._watch.check()
        checkpoint_files.save(self._run_dir, step, state, keep=self._keep)

    def _failure(self, step: int, reason: str) -> CheckpointError:
        with contextlib.suppress(OSError):  # the disk may be gone
            reason += f"; {shutil.disk_usage(self._run_dir).free / 1e6:.0f} MB are free"
        return CheckpointError(
            f"the checkpoint after step {step} could not be written to {self._root} ({reason}); the one before it is "
            "whole: make room, and run again to go on from it"
        )
