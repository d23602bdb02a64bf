"""The flagship recipe on real photographs, killed in the middle: SEW-ResNet34 at 224 x 224 through the real launcher.

    python -m benchmarks.flagship ILSVRC_MINI [--log FILE]

ILSVRC_MINI is a folder with a few hundred images packed as ImageNet is: ILSVRC2012_img_train.tar, _img_val.tar and
_devkit_t12.tar.gz. They are sharded, then `imagenet_sew34_chi` trains 20 steps of 16 images on two CPU ranks in bf16.
After step 12 every process gets SIGKILL, and the run is started again. It resumes from the checkpoint after step 10,
and the repeated steps must have the same losses to the last bit.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline.data.manifest import Manifest
from pipeline.metrics.journal import read_journal

STEPS, BATCH, KILLED_AFTER, EVERY = 20, 16, 12, 5


def shards(archives: Path, folder: Path) -> list[str]:
    """Packs the archives; returns the lines that data_prep prints."""
    command = [sys.executable, "-m", "data_prep", "imagenet", str(folder)]
    for option, name in (("train", "img_train.tar"), ("val", "img_val.tar"), ("devkit", "devkit_t12.tar.gz")):
        command += [f"--{option}", str(archives / f"ILSVRC2012_{name}")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("train:", "val:", "done"))]


def command(data: Path, run_dir: Path) -> list[str]:
    settings = {
        "--recipe": "imagenet_sew34_chi",
        "--data.path": data,
        "--data.global_batch": BATCH,
        "--data.micro_batch": BATCH // 4,
        "--optim.lr": 0.1 * BATCH / 256,
        "--train.precision": "bf16",
        "--train.epochs": (STEPS - 0.5) * BATCH / Manifest.load(data / "train").num_samples,
        "--train.eval_every_epochs": 0,
        "--train.checkpoint_every": EVERY,
        "--train.log_every": 1,
        "--chi.interval": 5,
        "--metrics.port": 0,
        "--run_dir": run_dir,
    }
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "launch/train.py"]
    return [*launcher, *(str(word) for pair in settings.items() for word in pair)]


def run(words: list[str], kill_at: int | None) -> tuple[int, list[str]]:
    """Runs a job and kills all its processes once it printed step `kill_at`; returns its exit code and our lines."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        if re.match(r"\[\d{4}-|WARNING|\s*$", line):
            continue  # a line of the launcher
        lines.append(line.rstrip())
        print(lines[-1], flush=True)
        if kill_at is not None and re.match(rf"step +{kill_at}/", line):
            os.killpg(process.pid, signal.SIGKILL)
            break
    return process.wait(), lines


def losses(run_dir: Path) -> dict[int, float]:
    return {r["step"]: r["train_loss"] for r in read_journal(run_dir / "metrics.jsonl") if "train_loss" in r}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("archives", type=Path)
    parser.add_argument("--log", metavar="FILE", type=Path, help="write the output here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data, run_dir = Path(scratch) / "imagenet", Path(scratch) / "run"
        lines = ["$ python -m data_prep imagenet …", *shards(arguments.archives, data)]
        words = command(data, run_dir)
        shown = " ".join(words[1:]).replace(scratch, "…")
        _, said = run(words, KILLED_AFTER)
        lines += [f"$ deepspeed {shown}", *said, f"(SIGKILL to every process after step {KILLED_AFTER})"]
        before = losses(run_dir)
        code, said = run(words, None)
        lines += ["$ deepspeed … (the same command)", *said, f"(exit code {code})"]
        after = losses(run_dir)
    resumed = KILLED_AFTER // EVERY * EVERY
    repeated = [step for step in before if step > resumed]
    same = bool(repeated) and all(before[step] == after.get(step) for step in before)
    each = ", ".join(f"{step}: {before[step]!r} and {after.get(step)!r}" for step in repeated)
    lines += [f"repeated steps, first and second time: {each}: {'the same bits' if same else 'NOT the same'}"]
    print(lines[-1])
    if arguments.log:
        arguments.log.write_text("\n".join(line.replace(scratch, "…") for line in lines) + "\n", encoding="utf-8")
    return 0 if code == 0 and same and list(after) == list(range(1, STEPS + 1)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
