"""One side of benchmarks/engine.py, in its own process: each input line gives a number of steps to train.

The first line is a JSON object that says what to build; the answer to every line is one JSON line, with the seconds.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import torch
from torch.nn import functional

from launch.recipes import imagenet_sew34_chi
from pipeline.config import Config
from pipeline.data.manifest import Manifest
from pipeline.snn import neurons
from pipeline.snn.networks.build import build

answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # what the run prints is not an answer


def configuration(job: dict) -> Config:
    recipe = imagenet_sew34_chi()
    return replace(
        recipe,
        run_dir=job["run_dir"],
        data=replace(recipe.data, path=job["data"], global_batch=job["batch"], micro_batch=job["micro_batch"]),
        train=replace(recipe.train, precision="bf16", log_every=1, checkpoint_every=10**9, eval_every_epochs=0),
        metrics=replace(recipe.metrics, port=0),
    )


def answer(seconds: float) -> None:
    answers.write(json.dumps({"seconds": seconds}) + "\n")


def wanted() -> int:
    """Steps that the next line asks for."""
    line = sys.stdin.readline()
    return json.loads(line) if line else 0


def fixed_batches(config: Config) -> list[tuple[torch.Tensor, torch.Tensor]]:
    size, n = config.data.image_size, config.data.micro_batch
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(n, 3, size, size, generator=generator) for _ in range(config.accumulation(1))]
    return [(images, torch.zeros(n, dtype=torch.int64)) for images in draw]


def bare(config: Config, make: Callable) -> None:
    """Trains on images in memory; `make` gives the function of one step."""
    torch.manual_seed(config.train.seed)
    classes = len(Manifest.load(f"{config.data.path}/train").classes)
    network = build(config.model, num_classes=classes, image_size=config.data.image_size)
    neurons.bind(network)
    step, data = make(config, network), fixed_batches(config)
    while count := wanted():
        began = time.perf_counter()
        for _ in range(count):
            step(data)
        answer(time.perf_counter() - began)


def plain(config: Config, network) -> Callable:
    optimizer = torch.optim.SGD(network.parameters(), lr=config.optim.lr, momentum=config.optim.momentum)

    def step(data: list) -> None:
        optimizer.zero_grad()
        for images, labels in data:
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(images)
            (functional.cross_entropy(logits.float().mean(0), labels) / len(data)).backward()
        optimizer.step()

    return step


def with_deepspeed(config: Config, network) -> Callable:
    from pipeline.engine.engine import build
    from pipeline.ranks.group import join

    place = join(config)
    engine = build(config, network, place.world_size)

    def step(data: list) -> None:
        for images, labels in data:
            engine.backward(functional.cross_entropy(engine(images).float().mean(0), labels))
            engine.step()

    return step


def whole_loop(config: Config) -> None:
    """The training loop itself; between turns it waits for the next input line."""
    from pipeline import train
    from pipeline.ranks.stop_requests import Watch
    from pipeline.run import prepare
    from pipeline.run_dir import run_folder

    run_folder.admit(config, int(os.environ.get("WORLD_SIZE", "1")))
    run = prepare(config, Watch())
    steps = run.loader.steps

    def gated(start: int, stop: int) -> Iterator:
        batches, count = steps(start, stop), wanted()
        while count:
            began = time.perf_counter()
            for _ in range(count):
                yield next(batches)
            answer(time.perf_counter() - began)
            count = wanted()

    run.loader.steps = gated
    with suppress(StopIteration):
        train.loop(run)


def main() -> None:
    job = json.loads(sys.stdin.readline())
    torch.set_num_threads(job["threads"])
    config = configuration(job)
    answers.write(json.dumps({"torch": torch.__version__}) + "\n")
    if job["side"] == "loop":
        whole_loop(config)
    else:
        bare(config, plain if job["side"] == "bare" else with_deepspeed)


if __name__ == "__main__":
    main()
