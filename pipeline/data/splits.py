"""The training and the validation split before the first step: whether a run can use them, and they fit together.

What is found here costs a second and a line, and not the hours after which an evaluation, or a shard that is opened for
the first time, would meet it.
"""

import os
from pathlib import Path

import numpy as np

from pipeline.config import DataConfig
from pipeline.data.manifest import MANIFEST_NAME, Manifest, read_samples
from pipeline.data.remote import is_remote, join
from pipeline.errors import ConfigError, DataError

TRAIN, EVALUATION = "train", "val"


def load_manifest(data: DataConfig, split: str) -> Manifest:
    """The manifest of a split below `data.path`, local or remote."""
    return Manifest.load(join(data.path, split), retries=data.retries, timeout_s=data.timeout_s)


def check_splits(data: DataConfig) -> Manifest:
    """The training split's manifest, once both splits can be used.

    The files of local splits are looked at; those of remote ones are when they come through the cache.

    Raises:
        ConfigError: there is no such set, or the classes of the two differ.
        DataError: a split has no samples or no classes, lacks a file, has a damaged file of records, or more labels
            out of range than `data.max_bad_ratio` allows.
    """
    train, evaluation = (load_manifest(data, split) for split in (TRAIN, EVALUATION))
    for split, manifest in ((TRAIN, train), (EVALUATION, evaluation)):
        where = join(data.path, split, MANIFEST_NAME)
        if not manifest.classes:
            raise DataError(f"{where} names no classes; make the shards again with python -m data_prep")
        if manifest.num_samples == 0:
            raise DataError(f"{where} has no samples; make the shards again with python -m data_prep")
    if train.classes != evaluation.classes:
        raise ConfigError(
            f"{join(data.path, EVALUATION)} has {differing(evaluation.classes, train.classes, 'train has')}; make both "
            "splits with the same classes in the same order"
        )
    if not is_remote(data.path):
        for split, manifest in ((TRAIN, train), (EVALUATION, evaluation)):
            _check_files(Path(join(data.path, split)), manifest, data.max_bad_ratio)
    return train


def differing(classes: tuple[str, ...], others: tuple[str, ...], others_have: str) -> str:
    """In what a split's `classes` first differ from `others`, in words."""
    if len(classes) != len(others):
        return f"{len(classes)} classes, but {others_have} {len(others)}"
    label = next(i for i, name in enumerate(classes) if name != others[i])
    return f"{classes[label]!r} as class {label}, where {others_have} {others[label]!r}"


def _check_files(folder: Path, manifest: Manifest, max_bad_ratio: float) -> None:
    try:
        there = {entry.name for entry in os.scandir(folder) if entry.is_file()}  # no link that leads nowhere
    except OSError as error:
        raise ConfigError(f"{folder} cannot be listed ({error.strerror}); mend its rights or its disk") from None
    named = [name for shard in manifest.shards for name in (shard.tar, shard.index, shard.samples)]
    missing = [name for name in named if name not in there]
    if missing:
        more = f", and {len(missing) - 1} more," if len(missing) > 1 else ""
        raise DataError(
            f"{folder / missing[0]}{more} is missing, though {MANIFEST_NAME} names it; copy the set again, or make the "
            "shards again with python -m data_prep"
        )
    wrong, example = 0, ""
    for shard in manifest.shards:
        labels = read_samples(folder, shard)["label"]
        outside = (labels < 0) | (labels >= len(manifest.classes))
        if outside.any() and not wrong:
            row = int(outside.argmax())
            example = f"sample {row} of {shard.tar} has label {labels[row]}"
        wrong += int(np.count_nonzero(outside))
    if wrong > max_bad_ratio * manifest.num_samples:
        raise DataError(
            f"{folder}: {wrong} of {manifest.num_samples} samples have a label outside of 0 to "
            f"{len(manifest.classes) - 1}, more than data.max_bad_ratio={max_bad_ratio} allows ({example}); make the "
            "shards again with python -m data_prep"
        )
