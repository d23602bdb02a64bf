"""launch/train.py in fp16 on CPU ranks, several runs in one process, for the real launcher.

RUNS holds a JSON list of [port on which the ranks meet, arguments], one for each run. OVERFLOW names training passes of
each run on the last rank, counted from 1, whose pixels are so large that the gradient overflows, as in 3,9. DeepSpeed
is told that the CPU computes in fp16: torch can, slowly.
"""

import json
import os

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine

from launch.train import main


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


if __name__ == "__main__":
    prepare()
    for port, words in json.loads(os.environ["RUNS"]):
        os.environ["MASTER_PORT"] = str(port)
        if code := main(words):
            raise SystemExit(code)
