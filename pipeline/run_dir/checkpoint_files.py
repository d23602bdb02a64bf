"""Checkpoints on the disk: complete or absent. Needs no engine, so any process can read them.

    RUN/checkpoints/step-00000100/
      state.pt        parameters, optimizer state and BatchNorm statistics by name; counters; the controller
      state.sha256    its hash
    RUN/checkpoints/latest     the name of the newest
    RUN/checkpoints/best       the name of the one with the best validation accuracy, and that accuracy

A checkpoint is written to a temporary folder, fsynced, then renamed, so a kill at any moment leaves the previous one.
"""

import hashlib
import logging
import os
import shutil
from pathlib import Path

import torch

from pipeline.errors import ConfigError, DataError, StoreError, is_outage
from pipeline.run_dir import atomic, outages

log = logging.getLogger(__name__)

FORMAT = 2
"""Version of the dict in state.pt; an older one is converted when it is read."""


def save(run_dir: Path, step: int, state: dict, *, keep: int = 2) -> Path:
    """Writes a checkpoint from rank 0; when it returns, the checkpoint is complete on the disk.

    Of the earlier checkpoints, the newest `keep` - 1 and the best are kept. Those of later steps were damaged when the
    run was resumed. They stay until the run has passed them, and do not count: else this one could be removed.

    Raises:
        OSError, RuntimeError: it could not be written; it may be tried again.
    """
    root = run_dir / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    final, unfinished = root / f"step-{step:08d}", temporary(root, step)
    sweep(run_dir)
    unfinished.mkdir()
    try:
        torch.save({"format": FORMAT, **state}, unfinished / "state.pt")
    except RuntimeError:  # torch's writer hides why the disk refused
        atomic.write(unfinished / "why", bytes(1 << 16), sync=True)
        raise
    digest = _digest(unfinished / "state.pt")
    (unfinished / "state.sha256").write_text(digest + "\n")
    for path in (unfinished / "state.pt", unfinished / "state.sha256", unfinished):
        atomic.flush(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(unfinished, final)
    _point(root / "latest", final.name)
    try:
        _remove_older(final, keep)
    except OSError as error:  # the new checkpoint is complete, so the run goes on
        log.warning("an old checkpoint in %s could not be removed (%s)", root, error.strerror)
    return final


def _remove_older(final: Path, keep: int) -> None:
    best = _pointed(final.with_name("best"))
    for old in [path for path in _folders(final.parent) if path.name <= final.name][:-keep]:
        if old.name not in best:
            shutil.rmtree(old)


def temporary(root: Path, step: int) -> Path:
    """Where the checkpoint after `step` lies until it is whole."""
    return atomic.temporary(root / f"step-{step:08d}")


def sweep(run_dir: Path) -> None:
    """Removes what a kill in the middle of a save left behind."""
    for leftover in atomic.unfinished(run_dir / "checkpoints"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def mark_best(run_dir: Path, step: int, accuracy: float) -> None:
    """Points `best` at the checkpoint after `step`, which must exist; the previous best may then be removed."""
    pointer = run_dir / "checkpoints" / "best"
    outages.outlast(lambda: _point(pointer, f"step-{step:08d} {accuracy!r}"), str(pointer), was_writable=True)


def best(run_dir: Path, step: int) -> float:
    """The accuracy of the best checkpoint for a run that continues after `step`; -1 if it has none.

    One of a later step does not count: the run will make and mark the checkpoint of that step again.
    """
    pointer = run_dir / "checkpoints" / "best"
    words = outages.outlast(lambda: _pointed(pointer), str(pointer))
    return float(words[1]) if len(words) == 2 and words[0] <= f"step-{step:08d}" else -1.0


def _point(pointer: Path, line: str) -> None:
    atomic.write(pointer, line + "\n", sync=True)


def _pointed(pointer: Path) -> list[str]:
    try:
        return pointer.read_text().split()
    except FileNotFoundError:
        return []


def load_newest(run_dir: Path) -> dict | None:
    """The newest intact checkpoint, or None; a damaged one is named in a warning and skipped.

    Raises:
        StoreError: their storage is gone, and did not come back.
    """
    root = run_dir / "checkpoints"
    for folder in reversed(outages.outlast(lambda: _folders(root), str(root))):
        if (state := load(folder)) is not None:
            return state
    return None


def load_to_resume(run_dir: Path) -> dict | None:
    """The newest intact checkpoint; None if the run has none yet.

    Raises:
        DataError: it has some, and all are damaged. A new start would overwrite a run that a backup may still restore.
    """
    state = load_newest(run_dir)
    if state is None and (steps := saved_steps(run_dir)):
        raise DataError(
            f"{run_dir}/checkpoints has none that can be read (after steps {', '.join(map(str, steps))}: all damaged); "
            "restore one, or remove that folder to train from the start"
        )
    return state


def load(folder: Path) -> dict | None:
    """One checkpoint, on the CPU; None and a warning if it is damaged.

    Raises:
        StoreError: its storage is gone, and did not come back.
    """
    try:
        return _read(folder)
    except StoreError:
        raise
    except DataError as error:
        log.warning("%s and passed over", error)
        return None


def saved_steps(run_dir: Path) -> list[int]:
    """The steps after which the run has checkpoints, in order."""
    root = run_dir / "checkpoints"
    names = [path.name.removeprefix("step-") for path in outages.outlast(lambda: _folders(root), str(root))]
    return sorted(int(name) for name in names if name.isdecimal())


def _folders(root: Path) -> list[Path]:
    """The checkpoints, the oldest first. Not by `glob`, to which a folder that cannot be listed is an empty one."""
    try:
        return sorted(root / name for name in os.listdir(root) if name.startswith("step-"))
    except FileNotFoundError:
        return []


def load_step(run_dir: Path, step: int) -> dict:
    """The checkpoint after `step`.

    Raises:
        ConfigError: there is none; the message names the existing ones.
        DataError: it is damaged; a StoreError where its storage is gone, and did not come back.
    """
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    if step not in (steps := saved_steps(run_dir)):
        there = ", ".join(map(str, steps)) or "none at all"
        raise ConfigError(f"{run_dir} has no checkpoint after step {step}; it has {there}")
    return _read(folder)


def _read(folder: Path) -> dict:
    return outages.outlast(lambda: _read_now(folder), f"checkpoint {folder}")


def _read_now(folder: Path) -> dict:
    try:
        expected = (folder / "state.sha256").read_text().strip()
        if _digest(folder / "state.pt") == expected:
            return converted(torch.load(folder / "state.pt", map_location="cpu", weights_only=True), folder)
        reason = "its hash does not match"
    except OSError as error:
        if is_outage(error):
            raise
        reason = error.strerror or str(error)
    raise DataError(f"checkpoint {folder} is damaged ({reason})")


def converted(state: dict, folder: Path) -> dict:
    """A checkpoint's dict, converted to the current format.

    Raises:
        ConfigError: a newer version of this program wrote it.
    """
    written = state.get("format", 1)
    if written > FORMAT:
        raise ConfigError(
            f"checkpoint {folder} is of format {written}, and this version reads up to {FORMAT}; use the version that "
            "wrote it, or a newer one"
        )
    if written == 1:  # separate entries for the controller and the neurons, a plain counter of non-finite steps
        state = dict(state)
        state["widths"] = {**state.pop("controller"), **state.pop("neurons")}
        state["nonfinite"] = {"in_a_row": state.pop("nonfinite_in_a_row", 0)}
        state = {"ema": None, **state, "format": FORMAT}
    return state


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
