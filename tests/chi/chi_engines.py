"""A small network on a DeepSpeed engine, its gradient by a plain backward pass, and a count of collectives.

The network has no BatchNorm, a silent input channel and dead output channels, so that known weights get no gradient:
0 < χ < 1. With more than one rank the second layer's weight lies across partitions. chi_matrix.py holds the cases.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from pipeline.chi.tap import Tap
from pipeline.config import Config, DataConfig, OptimConfig, TrainConfig
from pipeline.engine import engine_state
from pipeline.engine.engine import build
from pipeline.snn.kernels.reference import Rule
from pipeline.snn.losses import cross_entropy
from pipeline.snn.networks.network import SpikingLayer
from pipeline.snn.neurons import Neuron, bind

T, MICRO_BATCH = 3, 4
COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_to_all_single",
)


class SparseNet(nn.Module):
    """Two spiking layers; 2 of 6 channels of the first are dead, 1 of 3 input channels is silent."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 8, 3, bias=False)
        self.sn1, self.sn2 = Neuron(rule, width=0.5), Neuron(rule, width=0.5)
        self.fc = nn.Linear(8, 4)
        with torch.no_grad():
            self.conv1.weight.mul_(3)
            self.conv2.weight.mul_(3)
            self.conv1.weight[:2] = -1.0  # images are not negative, so these never come near the threshold

    def spiking_layers(self) -> list[SpikingLayer]:
        pairs = (("sn1", self.sn1, self.conv1), ("sn2", self.sn2, self.conv2))
        return [SpikingLayer(name, neuron, cast(nn.Parameter, conv.weight)) for name, neuron, conv in pairs]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        s = self.sn1(self.conv1(images)[None], num_steps=T)
        s = self.sn2(self.conv2(s.flatten(0, 1)).unflatten(0, (T, -1)))
        return self.fc(s.mean((3, 4)))


def batches(rank: int, accumulation: int, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    result = []
    for _ in range(accumulation):
        images = torch.rand(MICRO_BATCH, 3, 8, 8, generator=generator)
        images[:, 1] = 0
        result.append((images, torch.randint(4, (MICRO_BATCH,), generator=generator)))
    return result


def plain_gradient(engine, data: list, precision: str) -> dict[str, torch.Tensor]:
    """The gradient averaged over micro-batches and ranks, by a copy of the network without DeepSpeed."""
    module = SparseNet(Rule())
    if precision == "fp16":
        module.half()
    scale = engine.optimizer.loss_scale if precision == "fp16" else 1.0
    for ours, theirs in zip(module.parameters(), engine.module.parameters(), strict=True):
        full = safe_get_full_fp32_param(theirs)
        ours.data.copy_(theirs if full is None else full)
    totals = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in module.named_parameters()}
    names, parameters = zip(*module.named_parameters(), strict=True)
    for images, labels in data:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = cross_entropy(module(images.to(parameters[0].dtype)), labels)
        for name, gradient in zip(names, torch.autograd.grad(loss * scale / len(data), parameters), strict=True):
            totals[name] += gradient.float() / scale
    for total in totals.values():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return totals


WAITS = ("aten::_local_scalar_dense", "aten::lift_fresh")
"""Ops that make the host wait on a GPU and can be counted on a CPU: reading a value, a tensor from Python numbers."""


class Counter:
    """Counts collective calls, their bytes, and `waits` of the host while it is open."""

    def __enter__(self) -> "Counter":
        self.calls, self.bytes, self.waits = 0, 0, 0
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]).__enter__()
        self._originals = {name: getattr(dist, name) for name in COLLECTIVES}
        for name, original in self._originals.items():
            setattr(dist, name, self._counted(original))
        return self

    def _counted(self, original):
        def call(tensor, *args, **kwargs):
            self.calls += 1
            self.bytes += tensor.nbytes if isinstance(tensor, torch.Tensor) else 0
            return original(tensor, *args, **kwargs)

        return call

    def __exit__(self, *_) -> None:
        self._profile.__exit__(None, None, None)
        self.waits = sum(event.count for event in self._profile.key_averages() if event.key in WAITS)
        for name, original in self._originals.items():
            setattr(dist, name, original)


def make(
    stage: int, precision: str, accumulation: int = 1, tapped: bool = True, rule: Rule | None = None, **optim: Any
) -> Any:
    world_size = dist.get_world_size()
    torch.manual_seed(0)
    module = SparseNet(rule or Rule())
    config = Config(
        recipe="matrix",
        data=DataConfig(global_batch=MICRO_BATCH * accumulation * world_size, micro_batch=MICRO_BATCH),
        optim=OptimConfig(**optim),
        train=TrainConfig(zero_stage=stage, precision=precision),
    )
    engine = build(config, module, world_size)
    neurons = bind(module)
    tap = Tap(engine, module.spiking_layers(), neurons) if tapped else None
    return engine, module, tap


def step(engine, data: list, tap: Tap | None, inspect=None) -> None:
    for images, labels in data:
        logits = engine(images)
        loss = cross_entropy(logits, labels)
        if tap is not None:
            tap.observe(loss, logits, labels)
        engine.backward(loss)
        if tap is not None:
            tap.check()
        if inspect is not None and engine.is_gradient_accumulation_boundary():
            inspect()
        engine.step()


def parameters(engine) -> list[torch.Tensor]:
    """The whole fp32 parameters; a collective."""
    masters = engine_state.masters(engine)
    if masters:
        return [master.detach().clone() for master in masters.values()]
    whole = [safe_get_full_fp32_param(parameter) for parameter in engine.module.parameters()]
    return [full.detach().clone() for full in whole if full is not None]
