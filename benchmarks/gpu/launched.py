"""Tier 2: images through DALI on the GPU and on the CPU, and the flagship recipe through the real launcher."""

import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu.findings import Findings
from benchmarks.gpu.runner import MARK, ROOT, end
from benchmarks.gpu.speed import EAGER, Trainer
from pipeline.config import DataConfig
from pipeline.data.loader import Loader
from pipeline.data.manifest import Manifest
from pipeline.metrics.journal import read_journal

STEPS, KILLED_AFTER, EVERY = 20, 12, 5
MICRO_BATCH = 32
CLASSES, IMAGES = 8, 512
LEVELS_APART = 0.5
"""Levels of 255 between the pixels of both decoders, in the mean: they round in other places."""
SETTLE, TIMED = 10, 50
"""Steps until the images that were decoded ahead are used up, and steps that are timed then."""


def photographs(folder: Path) -> None:
    """A set of smooth random JPEGs of ImageNet's usual size, sharded by the real command."""
    from PIL import Image

    draw = np.random.default_rng(0)
    for split, count in (("train", IMAGES), ("val", 64)):
        for number in range(count):
            place = folder / "images" / split / f"class{number % CLASSES}"
            place.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(place / f"{number}.jpg", quality=90)
    command = [sys.executable, "-m", "data_prep", "imagefolder", str(folder / "images"), str(folder / "set")]
    subprocess.run(command, check=True, cwd=ROOT)


def images_of(findings: Findings, folder: Path) -> DataConfig:
    """The images of a check: the digits where it is simulated."""
    if not findings.simulated:
        photographs(folder)
        return DataConfig(path=str(folder / "set"), image_size=224, global_batch=64, micro_batch=MICRO_BATCH)
    command = [sys.executable, "-m", "data_prep", "digits", str(folder / "set")]
    subprocess.run(command, check=True, cwd=ROOT)
    return DataConfig(path=str(folder / "set"), image_size=16, global_batch=64, micro_batch=MICRO_BATCH, flip=False)


def decoded(data: DataConfig, device: torch.device, steps: int, ranks: int) -> torch.Tensor:
    """Images of the first steps of all ranks, in their order in the stream, on the CPU."""
    parts = [[] for _ in range(steps)]
    for rank in range(ranks):
        loader = Loader(data, seed=0, rank=rank, world_size=ranks, device=device)
        for step, batches in enumerate(loader.steps(0, steps)):
            parts[step] += [batch.images.cpu() for batch in batches]
        loader.close()
    return torch.cat(list(chain(*parts)))


def decoding_rate(data: DataConfig, device: torch.device) -> float:
    """Images/s of one rank's loader that nobody holds up."""
    loader, began = Loader(data, seed=0, rank=0, world_size=1, device=device), 0.0
    for step, batches in enumerate(loader.steps(0, SETTLE + TIMED)):
        for batch in batches:
            batch.images[-1, 0, 0, 0].item()
        if step + 1 == SETTLE:
            began = time.perf_counter()
    seconds = time.perf_counter() - began
    loader.close()
    return data.global_batch * TIMED / seconds


def decoding(findings: Findings, device: torch.device) -> None:
    """Pixels and speed of `mixed` against `cpu`; a sample has the same pixels on any number of ranks."""
    with tempfile.TemporaryDirectory() as scratch:
        data = images_of(findings, Path(scratch))
        found = {}
        for name, on in (("cpu", torch.device("cpu")), ("mixed", device)):
            if name == "mixed" and device.type != "cuda":
                findings.absent("decoding, mixed", "there is no GPU")
                return
            findings.figure(f"decoding, {name}", decoding_rate(data, on), "images/s")
            found[name], again = (decoded(data, on, 2, ranks) for ranks in (1, 2))
            findings.check(f"two ranks get the pixels of one, {name}", torch.equal(found[name], again))
    apart = 57.0 * (found["mixed"] - found["cpu"]).abs()  # pixels are divided by a deviation of some 57 levels
    said = f"{apart.mean().item():.3g} levels in the mean, {LEVELS_APART} allowed"
    findings.check("mixed against cpu, pixels", apart.mean().item() <= LEVELS_APART, said)
    findings.figure("mixed against cpu, most", apart.max().item(), "levels of 255", None, "lower")


def words(data: DataConfig, run_dir: Path, ranks: int, simulated: bool) -> list[str]:
    """The launcher's command."""
    batch = ranks * MICRO_BATCH
    settings = {
        "--recipe": "digits" if simulated else "imagenet_sew34_chi",
        "--run_dir": run_dir,
        "--data.path": data.path,
        "--data.global_batch": batch,
        "--data.micro_batch": MICRO_BATCH,
        "--optim.lr": 0.1 * batch / 256,
        "--train.epochs": (STEPS - 0.5) * batch / Manifest.load(f"{data.path}/train").num_samples,
        "--train.eval_every_epochs": 0,
        "--train.checkpoint_every": EVERY,
        "--train.log_every": 1,
        "--train.deterministic": "true",
        "--chi.calibrate": "true",
        "--chi.interval": 5,
        "--metrics.port": 0,
    }
    if not simulated:
        settings["--train.precision"] = "fp16"
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    return [*launcher, "launch/train.py", *(str(word) for pair in settings.items() for word in pair)]


def launched(command: list[str], kill_at: int | None) -> tuple[int, list[str]]:
    """Runs a job, and kills all its processes once it printed step `kill_at`; its exit code and last lines."""
    mark = f"{os.environ.get(MARK, 'launched')}.{os.getpid()}"
    variables = {k: v for k, v in os.environ.items() if k not in ("CHISPIKE_TEST_INTERPRETER", "TRITON_INTERPRET")}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**variables, MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said = [*said[-9:], line.rstrip()]
        print(said[-1], flush=True)
        if kill_at is not None and re.match(rf"step +{kill_at}/", line):
            break
    else:
        process.wait()
    code = process.poll()
    end(process, mark)
    return (-9 if code is None else code), said


def flagship(findings: Findings, device: torch.device) -> None:
    """The recipe through the launcher: calibrated, killed with SIGKILL in the middle, resumed."""
    ranks = torch.cuda.device_count() if device.type == "cuda" else 2
    if findings.simulated:
        findings.absent("fp16", "there is no GPU; the digits are trained in the CPU's own precision instead")
    with tempfile.TemporaryDirectory() as scratch:
        data, run_dir = images_of(findings, Path(scratch)), Path(scratch) / "run"
        command = words(data, run_dir, ranks, findings.simulated)
        _, said = launched(command, KILLED_AFTER + 1)  # a step is printed before it is in the journal
        before = records(run_dir)
        findings.check(f"{KILLED_AFTER} steps of {ranks} ranks", KILLED_AFTER in before, " | ".join(said)[-300:])
        if KILLED_AFTER not in before:
            return
        code, said = launched(command, None)
        after = records(run_dir)
    whole = code == 0 and list(after) == list(range(1, STEPS + 1))
    findings.check("resumed after SIGKILL to every process", whole, f"code {code}: {' | '.join(said)}"[-300:])
    widths = before[1]["layer_surrogate_width"]
    findings.check("calibrated widths", len(set(widths)) > 1 and all(map(finite, widths)), f"{widths}"[:300])
    losses = [record["train_loss"] for record in after.values()]
    findings.check("every loss is finite", all(map(finite, losses)), f"{losses}"[:300])
    repeated = range(KILLED_AFTER // EVERY * EVERY + 1, KILLED_AFTER + 1)
    pairs = [(before[n]["train_loss"], after.get(n, {}).get("train_loss")) for n in repeated]
    findings.check("repeated steps have the same losses", all(a == b for a, b in pairs), f"{pairs}"[:300])
    of_loop(findings, device, [record for step, record in after.items() if step > KILLED_AFTER], ranks)


def of_loop(findings: Findings, device: torch.device, late: list[dict], ranks: int) -> None:
    """Data wait, and the loop's step over the bare one of the same network and micro-batch."""
    wait = statistics.median(r["data_wait_ratio"] for r in late) if late else None
    findings.figure("data wait", wait and 100 * wait, "%", None, "lower")
    loop = MICRO_BATCH * ranks / statistics.median(r["train_images_per_second"] for r in late) if late else None
    bare = None
    if not findings.simulated:
        job = {"side": EAGER, "surrogate": "triangle", "arch": "sew_resnet34", "T": 4, "size": 224}
        side = Trainer(sys.executable, {**job, "batch": MICRO_BATCH, "dtype": "fp16", "device": device.type})
        for _ in range(3):
            side.turn(3)
        side.close()
        bare = None if side.failed else statistics.median(turn["seconds"] for turn in side.turns)
    over = 100 * (loop / bare - 1) if loop and bare else None
    findings.figure(f"a step of the loop on {ranks} ranks over the bare step", over, "%", 3.0, "lower")


def records(run_dir: Path) -> dict[int, dict]:
    return {r["step"]: r for r in read_journal(run_dir / "metrics.jsonl") if "train_loss" in r}


def finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
