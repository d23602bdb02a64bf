"""launch/train.py in fp16 on CPU ranks, several runs in one process, for the real launcher.

RUNS holds a JSON list of [port on which the ranks meet, arguments], one for each run. OVERFLOW names training passes of
each run on the last rank, counted from 1, whose pixels are so large that the gradient overflows, as in 3,9. DeepSpeed
is told that the CPU computes in fp16: torch can, slowly. After LOOK optimizer steps the network is evaluated and looked
at, as at the end of a run; 0: not at all.
"""

import json
import os
from collections.abc import Iterator

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine

from launch.train import main
from pipeline import train
from pipeline.data.loader import evaluation_batches
from pipeline.engine.evaluate import evaluate
from pipeline.engine.insight.spikes import Spikes


def prepare() -> None:
    """Wraps functions of DeepSpeed; the program itself has no code for this."""
    get_accelerator().is_fp16_supported = lambda: True  # pyright: ignore
    forward, chosen = DeepSpeedEngine.forward, os.environ["OVERFLOW"].split(",")
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1

    def forward_with_overflow(engine, images):
        if last and engine.module.training and torch.is_grad_enabled():  # a calibration needs no gradient
            engine.passages = getattr(engine, "passages", 0) + 1
            if str(engine.passages) in chosen:
                images = images * 6e4
        return forward(engine, images)

    DeepSpeedEngine.forward = forward_with_overflow  # pyright: ignore[reportAttributeAccessIssue]


def look_after(step: int) -> None:
    """Wraps the training loop, and looks at the network between two of its steps."""
    loop = train.loop

    def looking(run: train.Run) -> int:
        steps = run.loader.steps

        def with_a_look(start: int, stop: int) -> Iterator:
            for done, micro_batches in enumerate(steps(start, stop), start):
                if done == step:
                    look(run)
                yield micro_batches

        run.loader.steps = with_a_look
        return loop(run)

    train.loop = looking


def look(run: train.Run) -> None:
    place = run.place
    batches = evaluation_batches(run.config.data, rank=place.rank, world_size=place.world_size, device=place.device)
    spikes = Spikes(run.widths.neurons, T=run.config.model.T, keeps=place.rank == 0)
    with run.ema.shown():
        evaluate(run.engine, batches, place.device, see=spikes.samples.see)
        spikes.look(run.engine)
    seen = spikes.document(step=run.step, weights="last", split="val", classes=run.loader.manifest.classes)
    if place.rank == 0:
        assert all(layer["rows"] for layer in seen["layers"])
        print(f"looked after step {run.step}", flush=True)


if __name__ == "__main__":
    prepare()
    if asked := int(os.environ["LOOK"]):
        look_after(asked)
    for port, words in json.loads(os.environ["RUNS"]):
        os.environ["MASTER_PORT"] = str(port)
        if code := main(words):
            raise SystemExit(code)
