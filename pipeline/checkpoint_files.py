"""Checkpoints on the disk: whole or absent. Knows nothing of engines, so that any process can read them.

    RUN/checkpoints/step-00000100/
      state.pt        parameters, optimizer state and BatchNorm statistics by name; counters; the controller
      state.sha256    its hash
    RUN/checkpoints/latest     the name of the newest

A checkpoint is written to a temporary folder, fsynced, then renamed, so a kill at any moment leaves the one before it.
"""

import hashlib
import logging
import os
import shutil
from pathlib import Path

import torch

from pipeline.errors import ConfigError, DataError

log = logging.getLogger(__name__)
KEEP = 2  # the newest, and the one to fall back to should it be damaged


def save(run_dir: Path, step: int, state: dict) -> Path:
    """Writes a checkpoint from rank 0; when it returns, the checkpoint is on the disk whole."""
    root = run_dir / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step-{step:08d}"
    temporary = root / f".{final.name}.tmp"
    for leftover in root.glob(".*.tmp"):
        shutil.rmtree(leftover)
    temporary.mkdir()
    torch.save(state, temporary / "state.pt")
    digest = _digest(temporary / "state.pt")
    (temporary / "state.sha256").write_text(digest + "\n")
    for path in (temporary / "state.pt", temporary / "state.sha256", temporary):
        _fsync(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    pointer = root / ".latest.tmp-file"
    pointer.write_text(final.name + "\n")
    _fsync(pointer)
    os.replace(pointer, root / "latest")
    _fsync(root)
    for old in sorted(root.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old)
    return final


def load_newest(run_dir: Path) -> dict | None:
    """The newest checkpoint that is whole, or None; a damaged one is named and passed over."""
    folders = sorted((run_dir / "checkpoints").glob("step-*"), reverse=True)
    return next((state for folder in folders if (state := load(folder)) is not None), None)


def load(folder: Path) -> dict | None:
    """One checkpoint, on the CPU; None, and a warning, where it is damaged."""
    try:
        return _read(folder)
    except DataError as error:
        log.warning("%s and passed over", error)
        return None


def saved_steps(run_dir: Path) -> list[int]:
    """The steps after which the run has checkpoints, in order."""
    names = [path.name.removeprefix("step-") for path in (run_dir / "checkpoints").glob("step-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def load_step(run_dir: Path, step: int) -> dict:
    """The checkpoint after `step`.

    Raises:
        ConfigError: there is none; the message names those that there are.
        DataError: it is damaged.
    """
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    if not folder.is_dir():
        there = ", ".join(map(str, saved_steps(run_dir))) or "none at all"
        raise ConfigError(f"{run_dir} has no checkpoint after step {step}; it has {there}")
    return _read(folder)


def _read(folder: Path) -> dict:
    try:
        expected = (folder / "state.sha256").read_text().strip()
        if _digest(folder / "state.pt") == expected:
            return torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        reason = "its hash does not match"
    except OSError as error:
        reason = error.strerror or str(error)
    raise DataError(f"checkpoint {folder} is damaged ({reason})")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
