"""Run on every rank by test_graphed_pass.py: engines whose passes are recorded, beside engines whose passes are not.

Each case prints one JSON line from rank 0.
"""

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from pipeline.chi.tap import Tap
from pipeline.chi.widths import Widths
from pipeline.config import ChiConfig, Config, DataConfig, ModelConfig, TrainConfig
from pipeline.engine.ema import Ema
from pipeline.engine.engine import build
from pipeline.engine.engine_state import EngineState
from pipeline.snn.graphed_pass import HostReplay, record_passes
from pipeline.snn.losses import cross_entropy
from pipeline.snn.networks.build import build as build_network
from pipeline.snn.neurons import bind
from tests.support.rank_lines import leave, tell

STEPS, ACCUMULATION, MICRO_BATCH = 4, 2, 4
CASES: dict[str, dict[str, Any]] = {
    "0 fp32": {"zero_stage": 0, "precision": "fp32"},
    "0 fp16": {"zero_stage": 0, "precision": "fp16"},
    "1 bf16": {"zero_stage": 1, "precision": "bf16"},
    "1 fp32 checkpoint": {"zero_stage": 1, "precision": "fp32", "checkpoint": True},
    "2 bf16": {"zero_stage": 2, "precision": "bf16"},
    "0 fp16 ms": {"zero_stage": 0, "precision": "fp16", "arch": "ms_tiny"},
    "1 bf16 ms checkpoint": {"zero_stage": 1, "precision": "bf16", "arch": "ms_tiny", "checkpoint": True},
    "1 fp32 ds_atgo": {"zero_stage": 1, "precision": "fp32", "policy": "ds_atgo"},
}


class Side:
    """An engine with what the training loop has around it; its passes are recorded where `graphed`."""

    def __init__(self, case: dict[str, Any], *, graphed: bool, seed: int = 0) -> None:
        torch.manual_seed(seed)
        world_size = dist.get_world_size()
        data = DataConfig(global_batch=MICRO_BATCH * ACCUMULATION * world_size, micro_batch=MICRO_BATCH, image_size=8)
        train = TrainConfig(zero_stage=case["zero_stage"], precision=case["precision"], ema_decay=0.5)
        chi = ChiConfig(interval=2, policy=case.get("policy", "chi"))
        config = Config(recipe="graph", data=data, train=train, chi=chi)
        fields = {name: case[name] for name in ("arch", "checkpoint") if name in case}
        model = ModelConfig(neuron="plif", scale="rms", **fields)
        self.network = build_network(model, num_classes=5, image_size=8)
        self.engine: Any = build(config, self.network, world_size)
        neurons, layers = bind(self.network), self.network.spiking_layers()
        self.graphed = record_passes(self.network, neurons, HostReplay) if graphed else None
        self.widths = Widths(config.chi, layers, neurons)
        self.tap = Tap(self.engine, layers, neurons, spread=self.widths.stats, skips=True)
        self.ema = Ema(self.engine, 0.5)
        self.kept: list[tuple[Tensor, Tensor]] = []

    def step(self, index: int, size: int = MICRO_BATCH) -> list[Tensor]:
        """One optimizer step; returns all that it shows."""
        seen = []
        generator = torch.Generator().manual_seed(10 * index + dist.get_rank())
        for _ in range(ACCUMULATION):
            images = torch.randn(size, 3, 8, 8, generator=generator)
            labels = torch.randint(5, (size,), generator=generator)
            images = images.half() if self.engine.fp16_enabled() else images
            logits = self.engine(images)
            loss = cross_entropy(logits, labels)
            self.kept.append((logits, logits.detach().clone()))
            self.tap.observe(loss, logits, labels)
            self.engine.backward(loss)
            self.tap.check()
            self.engine.step()
            seen.append(loss.detach())
        reading = self.tap.read()
        self.widths.step(reading.measured, index / STEPS)
        self.ema.after_step(index + 1)
        found = reading.indicators
        return [
            *seen,
            found.chi,
            found.coverage,
            found.firing_rate,
            found.grad_norm,
            self.widths.neurons.widths.clone(),
        ]

    def parts(self) -> dict[str, Any]:
        return {"model": EngineState(self.engine), "ema": self.ema, "widths": self.widths}

    def state(self) -> dict:
        return {
            "model": EngineState(self.engine).state_dict(),
            "ema": self.ema.state_dict(),
            "widths": self.widths.state_dict(),
        }

    def load(self, state: dict) -> None:
        for name, part in self.parts().items():
            part.load_state_dict(state[name])


def leaves(tree: Any) -> list:
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]
    return [tree]


def same(ours: list, theirs: list) -> bool:
    """Bit for bit; NaN is the same as NaN."""
    return len(ours) == len(theirs) and all(
        torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7)) if isinstance(a, Tensor) else a == b
        for a, b in zip(ours, theirs, strict=True)
    )


def case(name: str) -> dict:
    plain, graphed = Side(CASES[name], graphed=False), Side(CASES[name], graphed=True)
    steps = [same(plain.step(index), graphed.step(index)) for index in range(STEPS)]
    assert graphed.graphed is not None
    replays = graphed.graphed.replays
    state, theirs = graphed.state(), plain.state()
    resumed = Side(CASES[name], graphed=True, seed=1)
    resumed.load(state)
    assert resumed.graphed is not None
    for index in range(STEPS, 2 * STEPS):
        shown = plain.step(index)
        steps.append(same(shown, graphed.step(index)) and same(shown, resumed.step(index)))
    before = graphed.graphed.replays
    odd = same(plain.step(90, size=3), graphed.step(90, size=3))
    smaller = graphed.graphed.replays - before
    after = same(plain.step(91), graphed.step(91))
    return {
        "case": name,
        "steps": steps,
        "replays": replays,
        "resumed replays": resumed.graphed.replays,
        "state": same(leaves(state), leaves(theirs)),
        "outputs stay": all(torch.equal(now, then) for now, then in graphed.kept),
        "smaller": odd and after and smaller == 0,
    }


def main() -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    torch.set_num_threads(1)
    accelerator: Any = get_accelerator()
    accelerator.is_fp16_supported = lambda: True  # few CPUs have fp16; torch emulates it, slowly
    for name in CASES:
        tell("CASE", case(name))
    leave()


if __name__ == "__main__":
    main()
