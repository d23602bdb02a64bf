"""Shard writing against GNU tar, against decoding alone, and against a plain webdataset ShardWriter loop.

    python -m benchmarks.shard_writing [--quick] [--json FILE] [--images FOLDER] [--scratch FOLDER]

All sides read the same files in turn, warm in the page cache: at least 2 GB of ImageNet's JPEGs in class folders (the
400 of ilsvrc-mini, repeated). Medians of neighbouring ratios are shown. Our side is timed as the whole command, from
start to exit with files flushed to disk; the others from after their imports to their last write. The last line gives
the least processor time that reading, hashing, writing and decoding these bytes takes. If ilsvrc-mini is neither beside
the repository nor in CHISPIKE_DATA, the images are synthetic, and the table says so.
"""

import argparse
import hashlib
import importlib.metadata
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import table
from benchmarks.table import row
from data_prep.images import inspect
from data_prep.sources.tars import walk_tar

ROOT = Path(__file__).resolve().parent.parent
ARCHIVE = "ilsvrc-mini/ILSVRC2012_img_train.tar"
FULL_BYTES, QUICK_BYTES = 2_050_000_000, 200_000_000


def find_images(given: str | None) -> tuple[list[tuple[str, bytes]], str]:
    """(class, JPEG) of each image to repeat, and a description of the images."""
    base = Path(given or os.environ.get("CHISPIKE_DATA") or ROOT.parent / "shared" / "data")
    if (base / ARCHIVE).exists():
        data, images = (base / ARCHIVE).read_bytes(), []
        for outer in walk_tar(base / ARCHIVE):
            for inner in walk_tar(base / ARCHIVE, outer.offset, outer.offset + outer.length):
                wnid = outer.name.decode().removesuffix(".tar")
                images.append((wnid, data[inner.offset : inner.offset + inner.length]))
        return images, "ImageNet images of ilsvrc-mini"
    random, images = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(40):
            coarse = Image.fromarray(random.integers(0, 256, (94, 125, 3), dtype=np.uint8))
            path = Path(folder) / "made.jpg"
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=95)
            images.append((f"n{number % 20:08d}", path.read_bytes()))
    return images, f"made-up images (no {ARCHIVE} in {base})"


def make_folder(folder: Path, images: list[tuple[str, bytes]], num_bytes: int) -> tuple[int, int]:
    """Writes the images into class folders again and again, up to `num_bytes`; returns their number and bytes."""
    num_images = total = turn = 0
    while total < num_bytes:
        for number, (wnid, data) in enumerate(images):
            path = folder / wnid / f"{wnid}_{turn}_{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            num_images, total = num_images + 1, total + len(data)
        turn += 1
    os.sync()
    return num_images, total


def _decode(paths: list[str]) -> int:
    for path in paths:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            image.load()
    return len(paths)


def decode_only(folder: Path, num_processes: int) -> float:
    """Seconds to read and decode every file with Pillow on `num_processes` processes, and nothing else."""
    paths = sorted(map(str, folder.rglob("*.JPEG")))
    start = time.perf_counter()
    with multiprocessing.get_context("fork").Pool(num_processes) as pool:
        chunks = [paths[at : at + 64] for at in range(0, len(paths), 64)]
        assert sum(pool.imap_unordered(_decode, chunks)) == len(paths)
    return time.perf_counter() - start


def shard_writer_loop(folder: Path, out: Path) -> float:
    """Seconds of the loop that webdataset's documentation shows, with our check of each image."""
    import webdataset

    paths = sorted(folder.rglob("*.JPEG"))
    labels = {name: label for label, name in enumerate(sorted({path.parent.name for path in paths}))}
    out.mkdir()
    start = time.perf_counter()
    writer_class = getattr(webdataset, "ShardWriter")  # noqa: B009 (its stubs do not name it)
    with writer_class(str(out / "train-%06d.tar"), maxsize=256 << 20, maxcount=1 << 30, verbose=0) as writer:
        for path in paths:
            data = path.read_bytes()
            inspect(memoryview(data))
            writer.write({"__key__": path.stem, "jpg": data, "cls": labels[path.parent.name]})
    return time.perf_counter() - start


def gnu_tar(folder: Path, out: Path, *, flush: bool) -> float:
    """Seconds of `tar cf`; with `flush`, until the file is on disk, as our shards are."""
    start = time.perf_counter()
    subprocess.run(["tar", "cf", str(out), "-C", str(folder), "."], check=True)
    if flush:
        subprocess.run(["sync", str(out)], check=True)
    return time.perf_counter() - start


def core_seconds(folder: Path, scratch: Path) -> dict[str, float]:
    """Processor time of each thing that packing must do to every byte, done in turn in this process."""
    spent: dict[str, float] = dict.fromkeys(("read the files", "SHA-256", "write", "decode"), 0.0)

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = work()
        spent[name] += time.process_time() - began
        return result

    with open(scratch / "copy", "wb", buffering=0) as out:
        for path in sorted(folder.rglob("*.JPEG")):
            data = timed("read the files", path.read_bytes)
            timed("SHA-256", lambda data=data: hashlib.sha256(data).digest())
            timed("write", lambda data=data: out.write(data))
            timed("decode", lambda path=path: _decode([str(path)]))
        timed("write", lambda: os.fsync(out.fileno()))
    (scratch / "copy").unlink()
    return spent


def ours(folder: Path, out: Path, *options: str) -> float:
    """Seconds of the whole command."""
    command = [sys.executable, "-m", "data_prep", "imagefolder", str(folder), str(out), *options]
    start = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and mtime of every file: they change when a file is written again."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def measure(scratch: Path, folder: Path, rounds: int, processes: int) -> dict[str, list[float]]:
    """Seconds of each side, in turn."""
    seconds: dict[str, list[float]] = {}

    def note(name: str, value: float, out: Path) -> None:
        seconds.setdefault(name, []).append(value)
        print(f"  {name:36} {value:8.2f} s", flush=True)
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True) if out.is_file() else None
        os.sync()  # unwritten pages of one side must not slow the next

    workers = ("--workers", str(processes))
    for turn in range(rounds):
        print(f"round {turn + 1} of {rounds}", flush=True)
        out = scratch / "out"
        note("GNU tar", gnu_tar(folder, out, flush=False), out)
        note("ours, no decode", ours(folder, out, "--no-decode", *workers), out)
        note("GNU tar, flushed", gnu_tar(folder, out, flush=True), out)
        note("decode only", decode_only(folder, processes), out)
        note("ours", ours(folder, out, *workers), scratch / "kept" if turn == rounds - 1 else out)
        if turn < rounds - 1:
            note("ShardWriter loop", shard_writer_loop(folder, out), out)
        else:
            before = snapshot(out)
            note("ours, second run", ours(folder, out, *workers), scratch / "none")
            seconds["files rewritten"] = [float(sum(before[name] != now for name, now in snapshot(out).items()))]
            shutil.rmtree(out)
            note("ShardWriter loop", shard_writer_loop(folder, out), out)
    return seconds


def rows_of(seconds: dict[str, list[float]], num_images: int, num_bytes: int, processes: int) -> list[dict]:
    def ratio(peer: str, our: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[peer], seconds[our], strict=True))

    median = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        row("copy without decode, against GNU tar", ratio("GNU tar", "ours, no decode"), "ratio", 0.9),
        row("… against GNU tar and a flush", ratio("GNU tar, flushed", "ours, no decode"), "ratio", 0.9),
        row(f"decode check, against decoding alone on {processes}", ratio("decode only", "ours"), "ratio", 0.9),
        row("with decode check, against a ShardWriter loop", ratio("ShardWriter loop", "ours"), "ratio", 1.8),
        row("second run", median["ours, second run"], "s", 2.0, "lower"),
        row("files rewritten by the second run", median["files rewritten"], "files", 0, "lower"),
        row("copy without decode", num_bytes / median["ours, no decode"], "bytes/s"),
        row("copy by GNU tar", num_bytes / median["GNU tar"], "bytes/s"),
        row("with decode check", num_images / median["ours"], "images/s"),
        row("decoding alone", num_images / median["decode only"], "images/s"),
        row("ShardWriter loop", num_images / median["ShardWriter loop"], "images/s"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="200 MB, 1 round, instead of 2 GB and 3 rounds")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--images", metavar="FOLDER", help="folder that holds ilsvrc-mini")
    parser.add_argument(
        "--scratch", metavar="FOLDER", help="where to put three times the data (default: temporary folder)"
    )
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    images, what = find_images(arguments.images)
    with tempfile.TemporaryDirectory(dir=arguments.scratch, prefix="shard_writing-") as text:
        scratch = Path(text)
        folder = scratch / "images"
        num_images, num_bytes = make_folder(folder, images, QUICK_BYTES if arguments.quick else FULL_BYTES)
        print(f"{num_images:,} {what}, {num_bytes / 1e9:.2f} GB")
        seconds = measure(scratch, folder, 1 if arguments.quick else 3, arguments.processes)
        parts = core_seconds(folder, scratch)
    rows = rows_of(seconds, num_images, num_bytes, arguments.processes)
    table.show(rows)
    print("core-seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in parts.items()))
    if arguments.json:
        tar = subprocess.run(["tar", "--version"], capture_output=True, text=True).stdout.split("\n")[0]
        packages = ("pillow", "webdataset", "numpy")
        table.write(
            arguments.json,
            rows,
            hardware=f"{table.processor()}, {arguments.processes} processes on {os.cpu_count()} cores",
            versions={"tar": tar, **{name: importlib.metadata.version(name) for name in packages}},
            command="python -m benchmarks.shard_writing" + (" --quick" if arguments.quick else ""),
            setting=f"{num_images} {what}, {num_bytes} bytes, warm in the page cache",
            seconds=seconds,
            core_seconds=parts,
        )


if __name__ == "__main__":
    main()
