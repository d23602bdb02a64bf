"""How long a checkpoint stalls the training of SEW-ResNet34; it is written while the next steps run.

    python -m benchmarks.checkpoint_stall [--quick] [--json FILE]

It runs the training loop itself at 224 x 224 on one CPU rank in bf16. Steps have only 4 images, so that a save shows,
and every 4th step is followed by a save. The stall is the time inside `save`, plus the excess of the next step
over the median step, as a thread hashes and syncs meanwhile. Images: ilsvrc-mini (the folder that CHISPIKE_DATA names,
or ../shared/data).
"""

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from benchmarks import table
from benchmarks.loader import real_images
from benchmarks.table import row
from launch.recipes import imagenet_sew34_chi
from pipeline.config import Config
from tests.conftest import free_port
from tests.support.data_sets import write_set

EVERY, BATCH, IMAGES = 4, 4, 40


def configuration(scratch: Path, saves: int) -> Config:
    recipe = imagenet_sew34_chi()
    steps = EVERY * (saves + 1)
    return replace(
        recipe,
        run_dir=str(scratch / "run"),
        data=replace(recipe.data, path=str(scratch / "data"), global_batch=BATCH, micro_batch=BATCH),
        train=replace(
            recipe.train,
            precision="bf16",
            epochs=(steps - 0.5) * BATCH / IMAGES,
            log_every=1,
            checkpoint_every=EVERY,
            eval_every_epochs=0,
        ),
        metrics=replace(recipe.metrics, port=0),
    )


def measure(scratch: Path, saves: int) -> tuple[dict[int, float], dict[int, float], int]:
    """By step: seconds of each step without its save, and seconds of each save; then the bytes of a checkpoint."""
    write_set(scratch / "data/train", real_images()[:IMAGES], per_shard=20)
    config = configuration(scratch, saves)
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(alone, MASTER_PORT=str(free_port()), DS_ACCELERATOR="cpu")
    from pipeline import train
    from pipeline.ranks.stop_requests import Watch
    from pipeline.run import prepare
    from pipeline.run_dir import run_folder

    run_folder.admit(config, 1)
    run = prepare(config, Watch())
    save, saved = train.save, {}
    ends = [time.perf_counter()]

    def timed(run) -> None:
        began = time.perf_counter()
        save(run)
        saved[run.step] = time.perf_counter() - began

    batches = run.loader.steps

    def counted(start: int, stop: int):
        for micro_batches in batches(start, stop):
            ends.append(time.perf_counter())
            yield micro_batches
        ends.append(time.perf_counter())

    train.save, run.loader.steps = timed, counted
    train.loop(run)
    run.writer.wait()
    size = sum(path.stat().st_size for path in (scratch / "run/checkpoints").glob(f"step-{run.step:08d}/*"))
    steps = {step: ends[step + 1] - ends[step] - saved.get(step, 0) for step in range(1, run.step + 1)}
    return steps, saved, size


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one save")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        steps, saved, size = measure(Path(scratch), 1 if arguments.quick else 5)
    after = {step: steps[step + 1] for step in saved if step + 1 in steps}
    usual = statistics.median(spent for step, spent in steps.items() if step > 2 and step - 1 not in saved)
    stalls = [saved[step] + max(0.0, spent - usual) for step, spent in after.items()]
    rows = [
        row("a step", usual, "s", better="lower"),
        row("inside save, median", statistics.median(saved.values()), "s", better="lower"),
        row("stall by a checkpoint over a step, median", statistics.median(stalls) / usual, "ratio", 1.0, "lower"),
        row("stall by a checkpoint over a step, longest", max(stalls) / usual, "ratio", better="lower"),
        row("a checkpoint", size / 1e6, "MB"),
    ]
    table.show(rows)
    if arguments.json:
        table.write(
            arguments.json,
            rows,
            hardware=f"{table.processor()}, 2 cores; no GPU was at hand",
            versions={name: version(name) for name in ("torch", "deepspeed")},
            command="python -m benchmarks.checkpoint_stall",
            setting=f"SEW-ResNet34, 224 x 224, T=4, bf16, one rank, {BATCH} images a step, a save every {EVERY} steps",
            steps_s=steps,
            saves_s=saved,
        )


if __name__ == "__main__":
    main()
