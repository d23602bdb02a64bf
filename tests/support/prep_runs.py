"""What the tests of `data_prep` share: the real command, what it wrote, and small collections to give it."""

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.collection import Split
from data_prep.prepare import Source
from pipeline.data.decode.events import Events, decode
from pipeline.data.manifest import Manifest, read_samples
from tests.conftest import ROOT
from tests.support.data_sets import drawn_jpeg


def prepare(*arguments: object, timeout: float = 120) -> subprocess.CompletedProcess:
    """Runs `python -m data_prep` with `arguments` to its end."""
    command = [sys.executable, "-m", "data_prep", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def indexed(source: Source, work: Path) -> tuple[dict[str, Split], list[str]]:
    """The splits that a source finds, without packing, and the lines that it says; `work` is made."""
    work.mkdir(parents=True, exist_ok=True)
    said: list[str] = []
    return {split.name: split for split in source.index(work, said.append)}, said


def counted(splits: dict[str, Split]) -> dict[str, dict[str, int]]:
    """Samples by split and class."""
    return {
        name: {label: int(np.sum(split.labels == number)) for number, label in enumerate(split.classes)}
        for name, split in splits.items()
    }


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def shards_of(folder: Path) -> dict[str, str]:
    """`contents` without prep.json, which also says where the samples came from."""
    return {name: digest for name, digest in contents(folder).items() if name != "prep.json"}


class Sample(NamedTuple):
    key: str
    label: int
    image: bytes
    height: int
    width: int

    @property
    def stem(self) -> str:
        """The name of the source's file, without its position in the set and its extension."""
        return self.key.split("_", 1)[1]


def samples_of(folder: Path) -> list[Sample]:
    """The samples of one split, read by the table and cut out of the tar by hand; the index must agree."""
    found = []
    for shard in Manifest.load(folder).shards:
        tar = (folder / shard.tar).read_bytes()
        lines = (folder / shard.index).read_text().splitlines()
        assert lines[0] == f"v1.2 {shard.num_samples}"
        for line, row in zip(lines[1:], read_samples(folder, shard), strict=True):
            _, label_at, label_length, label_name, extension, at, length, name = line.split()
            assert (int(at), int(length)) == (row["offset"], row["length"])
            assert int(tar[int(label_at) : int(label_at) + int(label_length)]) == row["label"]
            assert name == label_name.removesuffix("cls") + extension
            image = tar[int(at) : int(at) + int(length)]
            size = (int(row["height"]), int(row["width"]))
            found.append(Sample(name.removesuffix(f".{extension}"), int(row["label"]), image, *size))
    return found


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tar_bytes(files: dict[str, bytes]) -> bytes:
    """A tar of these names and bytes."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


def zip_bytes(files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of these names and bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def drawn_folder(num: int = 12, classes: tuple[str, ...] = ("ant", "bee", "cat")) -> dict[str, bytes]:
    """Names and bytes of `num` small JPEG files in class folders."""
    return {f"{classes[i % len(classes)]}/{i:03d}.jpg": drawn_jpeg(i, 24 + i, 40) for i in range(num)}


def read_by_dali(folder: Path) -> list[tuple[int, bytes, tuple[int, int]]]:
    """Label, bytes, and height and width once decoded, of every sample that DALI's own reader finds with our index."""
    from nvidia.dali import fn
    from nvidia.dali.pipeline import pipeline_def

    manifest = Manifest.load(folder)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)  # pyright: ignore[reportArgumentType]
    def pipeline():
        image, label = fn.readers.webdataset(  # pyright: ignore[reportGeneralTypeIssues]
            paths=[str(folder / shard.tar) for shard in manifest.shards],
            index_paths=[str(folder / shard.index) for shard in manifest.shards],
            ext=["jpg;png", "cls"],
            missing_component_behavior="error",
        )
        return image, label, fn.decoders.image(image)

    built, found = pipeline(), []
    built.build()
    for _ in range(manifest.num_samples):
        image, label, pixels = (np.asarray(output.at(0)) for output in built.run())
        assert pixels.dtype == np.uint8
        found.append((int(label.tobytes()), image.tobytes(), pixels.shape[:2]))
    return found


def packed(folder: Path) -> dict[str, Events]:
    """The recordings of a split, by stem."""
    return {sample.stem: decode(sample.image) for sample in samples_of(folder)}
