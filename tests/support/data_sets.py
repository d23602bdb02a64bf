"""Shard sets for the tests of the loader: of drawn JPEGs and events, and of real JPEGs where the shared ones are."""

import hashlib
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from webdataset.writer import TarWriter

from pipeline.data.decode.events import EXTENSION, MAGIC, Events, encode
from pipeline.data.manifest import EVENTS, IMAGES, MANIFEST_NAME, SAMPLE_DTYPE, Manifest, Shard
from pipeline.data.prefetcher import Batch

ROOT = Path(__file__).parents[2]


def shared_images() -> Path:
    """The folder `ilsvrc-mini`; skips the test where there is none."""
    folder = Path(os.environ.get("CHISPIKE_DATA", ROOT.parent / "shared" / "data")) / "ilsvrc-mini"
    if not folder.is_dir():
        pytest.skip(f"no real images in {folder}; set CHISPIKE_DATA to the folder that holds ilsvrc-mini")
    return folder


def real_jpegs(count: int) -> list[bytes]:
    """The first `count` validation images of ilsvrc-mini."""
    with tarfile.open(shared_images() / "ILSVRC2012_img_val.tar") as archive:
        return [archive.extractfile(archive.next()).read() for _ in range(count)]  # pyright: ignore


def drawn_jpeg(number: int, height: int = 48, width: int = 64, quality: int = 90) -> bytes:
    """A smooth picture that differs for every number."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def drawn_recording(number: int, height: int = 34, width: int = 34, num_events: int = 2000) -> bytes:
    """Events of a bar that moves over the sensor; they differ for every number."""
    rng = np.random.default_rng(number)
    t = np.sort(rng.integers(0, 100_000, num_events))
    x = (t * width // 100_000 + rng.integers(0, 3 + number % 4, num_events)) % width
    y = rng.integers(0, height, num_events)
    return encode(Events(t - t[0], x, y, rng.integers(0, 2, num_events), width, height))


def write_set(
    folder: Path, images: list[bytes], *, per_shard: int, classes: int = 4, labels: dict[int, int] | None = None
) -> Manifest:
    """Writes a shard set of images, or of events where the first sample is a recording; sample i has label i mod
    `classes` unless `labels` says otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for first in range(0, len(images), per_shard):
        name = f"{folder.name}-{len(shards):06d}"
        numbers = range(first, min(first + per_shard, len(images)))
        shards.append(_write_shard(folder, name, images, numbers, classes, labels or {}))
    kind = EVENTS if images[0].startswith(MAGIC) else IMAGES
    names = tuple(f"c{i}" for i in range(classes))
    manifest = Manifest(split=folder.name, classes=names, shards=tuple(shards), kind=kind)
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _write_shard(
    folder: Path, name: str, images: list[bytes], numbers: range, classes: int, labels: dict[int, int]
) -> Shard:
    label = {n: labels.get(n, n % classes) for n in numbers}
    extension = EXTENSION if images[0].startswith(MAGIC) else "jpg"
    with TarWriter(str(folder / f"{name}.tar"), mtime=0) as tar:
        for n in numbers:
            tar.write({"__key__": f"{n:06d}", extension: images[n], "cls": str(label[n]).encode()})
    with tarfile.open(folder / f"{name}.tar") as archive:
        members = {member.name: member for member in archive.getmembers()}
    records, lines = np.zeros(len(numbers), SAMPLE_DTYPE), [f"v1.2 {len(numbers)}"]
    for row, n in enumerate(numbers):
        parts = [members[f"{n:06d}.{suffix}"] for suffix in (extension, "cls")]
        lines.append(" ".join(f"{p.name.split('.')[1]} {p.offset_data} {p.size} {p.name}" for p in parts))
        height, width = _size(images[n])
        records[row] = (parts[0].offset_data, parts[0].size, label[n], height, width)
    np.save(folder / f"{name}.npy", records)
    (folder / f"{name}.idx").write_text("\n".join(lines) + "\n")
    hashes = [hashlib.sha256((folder / f"{name}.{s}").read_bytes()).hexdigest() for s in ("tar", "idx", "npy")]
    return Shard(
        name=name,
        num_samples=len(numbers),
        num_bytes=(folder / f"{name}.tar").stat().st_size,
        sha256=hashes[0],
        index_sha256=hashes[1],
        samples_sha256=hashes[2],
    )


def _size(image: bytes) -> tuple[int, int]:
    """Height and width after EXIF rotation; of a damaged file what its header said when the set was made."""
    try:
        opened = Image.open(io.BytesIO(image))
    except OSError:
        return 48, 64
    width, height = opened.size
    on_its_side = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (width, height) if on_its_side else (height, width)


def same(one: dict[int, Batch], other: dict[int, Batch]) -> bool:
    """Whether two collections of batches, by position, hold the same images and labels to the bit."""
    return one.keys() == other.keys() and all(
        torch.equal(batch.images, other[at].images) and torch.equal(batch.labels, other[at].labels)
        for at, batch in one.items()
    )
