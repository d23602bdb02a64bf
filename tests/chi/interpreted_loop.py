"""Run on every rank by test_interpreted_loop.py: three training steps through the GPU kernels, on the CPU.

Triton's interpreter runs the kernels. Each case trains twice from the same weights and images, once by the reference
and once by the kernels, on a real engine, and steers the widths after each step. Prints a line for each case.
"""

import contextlib
import os
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from triton.runtime.interpreter import GridExecutor

from pipeline.chi.tap import Tap
from pipeline.chi.widths import Widths
from pipeline.config import ChiConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from pipeline.engine.engine import build
from pipeline.snn.kernels import compiled
from pipeline.snn.losses import cross_entropy
from pipeline.snn.networks import sew_resnet
from pipeline.snn.neurons import bind
from tests.support.rank_lines import leave, tell

STEPS, MICRO_BATCH, SIZE, T = 3, 2, 4, 2
CASES = (  # precision, connect, neuron: each value of each, and most pairs
    ("fp32", "add", "lif"),
    ("bf16", "iand", "plif"),
    ("fp16", "and", "lif"),
    ("fp32", "iand", "plif"),
)


def through_kernels(yes: bool) -> None:
    """From here on CPU tensors go through the Triton kernels, or not."""
    os.environ["CHISPIKE_TEST_INTERPRETER"] = "1" if yes else ""
    compiled.gives_way.cache_clear()


@contextlib.contextmanager
def launches():
    """The set of the names of the kernels that are launched while it is open."""
    names, call = set(), GridExecutor.__call__

    def counted(executor, *args, **kwargs):
        names.add(executor.fn.__name__)
        return call(executor, *args, **kwargs)

    with mock.patch.object(GridExecutor, "__call__", counted):
        yield names


def trained(precision: str, connect: str, neuron: str) -> list[dict]:
    """What each step measured."""
    world_size = dist.get_world_size()
    model = ModelConfig(connect=connect, neuron=neuron, T=T, v_th=0.5)
    config = Config(
        recipe="interpreted",
        data=DataConfig(global_batch=MICRO_BATCH * world_size, micro_batch=MICRO_BATCH, image_size=SIZE),
        model=model,
        chi=ChiConfig(interval=1, eta=0.5),
        optim=OptimConfig(lr=0.05),
        train=TrainConfig(zero_stage=1, precision=precision),
    )
    torch.manual_seed(0)
    network = sew_resnet.build(model, num_classes=4, image_size=SIZE)
    engine = build(config, network, world_size)
    neurons, layers = bind(network), network.spiking_layers()
    widths = Widths(config.chi, layers, neurons)
    tap = Tap(engine, layers, neurons, spread=widths.stats)
    generator = torch.Generator().manual_seed(dist.get_rank())
    steps = []
    while len(steps) < STEPS:
        images = torch.rand(MICRO_BATCH, 3, SIZE, SIZE, generator=generator) * 2
        labels = torch.randint(4, (MICRO_BATCH,), generator=generator)
        if precision == "fp16":
            images = images.half()
        logits = engine(images)
        loss = cross_entropy(logits, labels)
        tap.observe(loss, logits, labels)
        engine.backward(loss)
        tap.check()
        engine.step()
        reading = tap.read()
        widths.step(reading.measured, len(steps) / STEPS)
        steps.append(
            {
                "loss": reading.loss.item(),
                "skipped": reading.skipped,
                "firing_rate": reading.indicators.firing_rate.tolist(),
                "coverage": reading.indicators.coverage.tolist(),
                "chi": reading.indicators.chi.tolist(),
                "participation": reading.indicators.participation.tolist(),
                "widths": neurons.widths.tolist(),
            }
        )
    return steps


def main() -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    torch.set_num_threads(1)
    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True  # pyright: ignore
    for case in CASES:
        runs, ran = [], []
        for kernels in (False, True):
            through_kernels(kernels)
            with launches() as names:
                runs.append(trained(*case))
            ran.append(sorted(names))
        tell("CASE", {"case": case, "reference": runs[0], "kernels": runs[1], "launched": ran})
    leave()


if __name__ == "__main__":
    main()
