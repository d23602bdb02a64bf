"""Which sample goes into which shard: a pure function of the index, the seed and the shard size.

The shuffle sorts samples by a fixed hash of (seed, position), so it does not change with a library's version.
"""

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from data_prep.collection import Split
from data_prep.tar_format import sample_bytes
from pipeline.data.order import mix

PLAN_VERSION = 1
DEFAULT_SHARD_BYTES = 256 << 20
MIN_SHARDS, SMALL_SHARD_BYTES = 8, 1 << 20  # so that all cores have work, and the order of shards matters


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What decides the bytes of the output, beside the source."""

    shard_bytes: int = 0
    """Size of a shard; 0 takes DEFAULT_SHARD_BYTES, or less where that would make few shards of a small split."""
    seed: int = 0
    resize: int = 0
    """Shorter side to shrink images to, in pixels; 0 copies images as they are."""
    quality: int = 90
    """JPEG quality of resized images, 1 to 100."""
    limit: int = 0
    """Most samples to take of a split; 0 takes all."""
    decode: bool = True
    """Decode every image in full; False looks at headers only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The shards of one split. Shard k holds samples `order[bounds[k]:bounds[k + 1]]`, in that order."""

    order: np.ndarray
    bounds: np.ndarray
    identity: str
    """SHA-256 over everything that decides the output's bytes, as far as it is known before reading images."""

    @property
    def num_shards(self) -> int:
        return len(self.bounds) - 1


def shuffled(num: int, seed: int) -> np.ndarray:
    """A permutation of `range(num)` fixed by `seed`, int64."""
    return np.argsort(mix(seed, np.arange(num)), kind="stable")


def make_plan(split: Split, options: Options, *, size_ratio: float = 1.0) -> Plan:
    """Orders the samples of `split` and cuts them into shards of nearly equal bytes.

    Args:
        split: the index.
        options: seed, limit and shard size count here. Training samples are shuffled. The others stay sorted, since
            the loader does not shuffle them. A limit takes a random draw of both.
        size_ratio: expected bytes of an image in the output per byte in the source, for resized images.
    """
    order = shuffled(len(split), options.seed)
    if options.limit:
        order = order[: options.limit]
    if split.name != "train":
        order = np.sort(order)
    sizes = sample_bytes((split.lengths[order] * size_ratio).astype(np.int64))
    ends = np.cumsum(sizes)
    total = int(ends[-1])
    num_shards = min(len(order), -(-total // (options.shard_bytes or DEFAULT_SHARD_BYTES)))
    if not options.shard_bytes:
        num_shards = max(num_shards, min(MIN_SHARDS, total // SMALL_SHARD_BYTES))
    # Equal shares instead of full shards and a remainder: readers that take whole shards stay balanced.
    targets = (np.arange(1, num_shards, dtype=np.float64) * (total / num_shards)).astype(np.int64)
    cuts = np.searchsorted(ends, targets, side="left") + 1
    bounds = np.unique(np.concatenate([[0], cuts, [len(order)]])).astype(np.int64)
    return Plan(order=order, bounds=bounds, identity=_identity(split, options, order, bounds))


def _identity(split: Split, options: Options, order: np.ndarray, bounds: np.ndarray) -> str:
    settings = {
        "version": PLAN_VERSION,
        "split": split.name,
        "classes": split.classes,
        "resize": options.resize,
        "quality": options.quality if options.resize else None,
        "decode": options.decode,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(split.names.blob)
    for column in (split.names.ends, split.labels, split.lengths, order, bounds):
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()
