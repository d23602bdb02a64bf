"""The loader against bare DALI, DALI's own reader, and Pillow in a torch DataLoader; resume, planning, data wait.

    python -m benchmarks.loader [--quick] [--json FILE] [--digits DIR]

Images: ilsvrc-mini (the folder that CHISPIKE_DATA names, or ../shared/data). Every round runs each side in turn on the
same cores, in its own process and after warm-up. A ratio is the median of the rounds' ratios, so that a busy moment of
the machine affects both sides. If a goal is missed, the report says where the loader's CPU time goes.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from benchmarks import table
from benchmarks.table import row
from tests.conftest import launch
from tests.support.data_servers import serve
from tests.support.data_sets import ROOT, drawn_jpeg, write_set

PACKAGES = ("nvidia-dali-cuda130", "torch", "webdataset", "pillow", "numpy", "fsspec", "aiohttp")
SIDES = {
    "ours": "this loader, local shards",
    "bare_dali": "bare DALI from memory",
    "native_dali": "DALI's webdataset reader",
    "native_default": "the same, plain chroma upsampling",
    "http": "this loader, HTTP, warm cache",
    "webdataset_pillow": "webdataset + Pillow, DataLoader",
    "folder_pillow": "image folder + Pillow, DataLoader",
}
GOALS = {"bare_dali": 0.95, "native_dali": 1.0, "webdataset_pillow": 3.0, "folder_pillow": 3.0}
IMAGENET_SHARDS, PER_SHARD = 1280, 1000


# One side, in its own process.


def side(name: str, path: str, cache: str, threads: int, batches: int) -> dict:
    """`timed` of a side by its name."""
    from benchmarks import loader_sides as sides

    make = {"ours": sides.ours, "http": sides.ours}.get(name) or getattr(sides, name)
    return timed(make(path, threads, cache) if name == "http" else make(path, threads), batches)


def timed(stream: Generator, batches: int) -> dict:
    """Images per second over `batches` after warm-up, and where the CPU time went."""
    import torch

    from benchmarks import loader_sides as sides

    torch.set_num_threads(1)
    with closing(stream):
        for _ in range(5):
            next(stream)
        before, began = thread_seconds(), time.perf_counter()
        for _ in range(batches):
            next(stream)
        elapsed, after = time.perf_counter() - began, thread_seconds()
    spent = {part: (after[part] - before.get(part, 0.0)) / batches / sides.BATCH for part in after}
    return {"images_per_s": batches * sides.BATCH / elapsed, "cpu_s_per_image": spent}


def thread_seconds() -> dict[str, float]:
    """CPU seconds by thread: Python's threads by name, all of DALI's together."""
    import threading

    names = {thread.native_id: thread.name.split("_")[0] for thread in threading.enumerate()}
    tick, seconds = os.sysconf("SC_CLK_TCK"), {}
    for task in Path("/proc/self/task").iterdir():
        fields = (task / "stat").read_text().rsplit(")", 1)[1].split()
        part = names.get(int(task.name), "DALI's threads")
        seconds[part] = seconds.get(part, 0.0) + (int(fields[11]) + int(fields[12])) / tick
    return seconds


def first_batch(path: str, start: int) -> dict:
    """Seconds and peak memory from a cold start to the first batch at sample `start`."""
    import torch

    from pipeline.config import DataConfig
    from pipeline.data.loader import Loader

    data = DataConfig(path=path, image_size=32, global_batch=64, micro_batch=64, threads=1)
    began = time.perf_counter()
    loader = Loader(data, seed=0, rank=0, world_size=1, device=torch.device("cpu"))
    next(next(loader.steps(start // 64, 1 << 40)))
    elapsed = time.perf_counter() - began
    loader.close()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"seconds": elapsed, "peak_bytes": int(peak.split()[1]) * 1024}


def planning() -> dict:
    """CPU seconds to plan one of 1,024 ranks' epoch of 1.28M samples."""
    from pipeline.data.order import Order

    began = time.process_time()
    order = Order([PER_SHARD] * IMAGENET_SHARDS, seed=0, window_shards=16)
    for step in range(PER_SHARD * IMAGENET_SHARDS // 32768 + 1):
        order.samples(step * 32768 + 500 * 32, 32)
    return {"seconds": time.process_time() - began}


def alone(call: str, *words: object) -> dict:
    """The result of `call(*words)` of this file in a fresh process."""
    code = f"import json; from benchmarks import loader; print(json.dumps(loader.{call}(*{words!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    if done.returncode:
        raise SystemExit(f"{call}{words} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# The data.


def real_images() -> list[bytes]:
    """The 400 training images of ilsvrc-mini."""
    folder = Path(os.environ.get("CHISPIKE_DATA", ROOT.parent / "shared" / "data")) / "ilsvrc-mini"
    if not folder.is_dir():
        raise SystemExit(f"no images in {folder}: set CHISPIKE_DATA to the folder that holds ilsvrc-mini")
    images = []
    with tarfile.open(folder / "ILSVRC2012_img_train.tar") as outer:
        for synset in outer:
            with tarfile.open(fileobj=io.BytesIO(outer.extractfile(synset).read())) as inner:  # pyright: ignore
                images += [inner.extractfile(member).read() for member in inner]  # pyright: ignore
    return images


def write_images(folder: Path) -> None:
    images = real_images()
    write_set(folder / "train", images, per_shard=50)
    (folder / "folder").mkdir()
    for number, image in enumerate(images):
        (folder / "folder" / f"{number:06d}.jpg").write_bytes(image)


def write_imagenet_sized(folder: Path) -> None:
    """A set of 1.28M samples: 1,280 names for one shard of 1,000 small images."""
    from pipeline.data.manifest import MANIFEST_NAME, Manifest

    one = write_set(folder / "train", [drawn_jpeg(n, 32, 32) for n in range(PER_SHARD)], per_shard=PER_SHARD)
    (first,) = one.shards
    shards = [replace(first, name=f"train-{n:06d}") for n in range(IMAGENET_SHARDS)]
    for shard in shards[1:]:
        for name, source in ((shard.tar, first.tar), (shard.samples, first.samples)):
            os.link(folder / "train" / source, folder / "train" / name)
    whole = Manifest(split="train", classes=one.classes, shards=tuple(shards))
    (folder / "train" / MANIFEST_NAME).write_text(whole.to_json())


# The measurements.


def compare(folder: Path, threads: int, rounds: int) -> tuple[list[dict], dict]:
    """Speed of every side, and the loader's CPU time by thread."""
    write_images(folder)
    speeds: dict[str, list[float]] = {name: [] for name in SIDES}
    profiles: dict[str, list[dict]] = {name: [] for name in [*SIDES, "decode_only"]}
    with serve(folder) as server:
        for number in range(rounds):
            for name in SIDES if number % 2 == 0 else reversed(SIDES):
                path = server.url if name == "http" else str(folder)
                batches = 8 if name.endswith("pillow") else 16
                got = alone("side", name, path, str(folder / "cache"), threads, batches)
                speeds[name].append(got["images_per_s"])
                profiles[name].append(got["cpu_s_per_image"])
                print(f"round {number + 1}: {SIDES[name]}: {got['images_per_s']:.0f} images/s", flush=True)
    rows = [row(f"images/s, {SIDES[name]}", statistics.median(speeds[name]), "images/s") for name in SIDES]
    for name, goal in GOALS.items():
        ratio = statistics.median(a / b for a, b in zip(speeds["ours"], speeds[name], strict=True))
        rows.append(row(f"speed against {SIDES[name]}", ratio, "ratio", goal))
    ratio = statistics.median(a / b for a, b in zip(speeds["http"], speeds["ours"], strict=True))
    rows.append(row("speed over HTTP with a warm cache, against local", ratio, "ratio", 0.97))
    for _ in range(rounds):
        profiles["decode_only"].append(alone("side", "decode_only", str(folder), "", threads, 16)["cpu_s_per_image"])
    profile = {
        name: {part: statistics.median(p.get(part, 0.0) for p in profiles[name]) for part in profiles[name][0]}
        for name in ("ours", "bare_dali", "decode_only", "native_dali")
    }
    return rows, profile


def resume(folder: Path, rounds: int) -> list[dict]:
    """What the first batch costs at sample 1,000,000 beyond that at sample 0."""
    write_imagenet_sized(folder)
    pairs = [
        (alone("first_batch", str(folder), 0), alone("first_batch", str(folder), 1_000_000)) for _ in range(rounds)
    ]
    extra = [(later["seconds"] - cold["seconds"], later["peak_bytes"] - cold["peak_bytes"]) for cold, later in pairs]
    return [
        row("cold start to the first batch", statistics.median(cold["seconds"] for cold, _ in pairs), "s"),
        row(
            "resume at sample 1,000,000, beyond a cold start", statistics.median(s for s, _ in extra), "s", 1.0, "lower"
        ),
        row("… memory", statistics.median(m for _, m in extra), "bytes", 100e6, "lower"),
        row(
            "planning an epoch of 1.28M samples on 1,024 ranks, per rank",
            statistics.median(alone("planning")["seconds"] for _ in range(rounds)),
            "s",
            1.0,
            "lower",
        ),
    ]


def data_wait(folder: Path, digits: Path, epochs: int) -> list[dict]:
    """Share of the step time that `make train` waits for data on two ranks, after its first ten steps."""
    if not (digits / "val" / "manifest.json").exists():
        print(f"no digits in {digits} (python -m data_prep digits {digits}): the data wait is left out")
        return []
    words = ["--recipe", "digits", "--run_dir", folder / "run", "--data.path", digits, "--metrics.port", 0]
    words += ["--train.epochs", epochs, "--train.log_every", 1]
    done = launch("launch/train.py", *map(str, words))
    if done.returncode:
        raise SystemExit(f"training ended with {done.returncode}:\n{done.output[-4000:]}")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    waits = [line["data_wait_ratio"] for line in lines if "data_wait_ratio" in line][10:]
    return [row("data wait in make train", statistics.mean(waits), "ratio", 0.02, "lower")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="1 round instead of 7, fewer epochs")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--digits", metavar="DIR", default="data/digits", help="shards for the data wait")
    arguments = parser.parse_args()
    threads, rounds = len(os.sched_getaffinity(0)), 1 if arguments.quick else 7
    with tempfile.TemporaryDirectory() as name:
        rows, profile = compare(Path(name, "images"), threads, rounds)
        rows += resume(Path(name, "imagenet"), 1 if arguments.quick else 5)
        rows += data_wait(Path(name), Path(arguments.digits).resolve(), 3 if arguments.quick else 10)
    table.show(rows)
    for name, parts in profile.items():
        spent = ", ".join(f"{part} {1e6 * seconds:.0f}" for part, seconds in sorted(parts.items()))
        print(f"CPU µs an image, {SIDES.get(name, 'its decoding alone')}: {spent}")
    if arguments.json:
        table.write(
            arguments.json,
            rows,
            hardware=f"{table.processor()}, {threads} of {os.cpu_count()} cores; no GPU was at hand: `mixed` decoding "
            "is not measured",
            versions={name: version(name) for name in PACKAGES},
            command="python -m benchmarks.loader" + (" --quick" if arguments.quick else ""),
            setting="ilsvrc-mini's 400 training images over and over, 224² random-resized crops, batches of 64",
            profile_cpu_s_per_image=profile,
        )


if __name__ == "__main__":
    main()
