"""Run on every rank by test_ema.py: the moving average of real engines against one computed by hand from whole weights.

Each case prints one JSON line from rank 0.
"""

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from pipeline.config import Config, DataConfig, ModelConfig, TrainConfig
from pipeline.engine import engine_state
from pipeline.engine.ema import Ema
from pipeline.engine.engine import build
from pipeline.snn.losses import cross_entropy
from pipeline.snn.networks import sew_resnet
from tests.support.rank_lines import leave, tell

STEPS, MICRO_BATCH, DECAY = 3, 4, 0.15  # step 0 keeps 1/10, step 1 keeps 0.15, since 2/11 is more
CASES = ((0, "fp16"), (1, "bf16"), (2, "fp32"), (3, "fp32"))


def make(stage: int, precision: str, seed: int = 0):
    torch.manual_seed(seed)
    config = Config(
        recipe="ema",
        data=DataConfig(global_batch=MICRO_BATCH * dist.get_world_size(), micro_batch=MICRO_BATCH, image_size=8),
        train=TrainConfig(zero_stage=stage, precision=precision, ema_decay=DECAY),
    )
    network = sew_resnet.build(ModelConfig(neuron="plif"), num_classes=5, image_size=8)
    engine = build(config, network, dist.get_world_size())
    return engine, Ema(engine, DECAY)


def step(engine, ema: Ema, index: int) -> None:
    generator = torch.Generator().manual_seed(10 * index + dist.get_rank())
    images = torch.randn(MICRO_BATCH, 3, 8, 8, generator=generator)
    labels = torch.randint(5, (MICRO_BATCH,), generator=generator)
    half = engine.fp16_enabled()
    engine.backward(cross_entropy(engine(images.half() if half else images), labels))
    engine.step()
    ema.after_step(index + 1)


def whole(engine) -> dict[str, Tensor]:
    """Parameters over all ranks, and this rank's running statistics: `gather_weights` without its averaging."""
    kept = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    parameters = engine_state.gather_weights(engine)["parameters"]
    for name, buffer in engine.module.named_buffers():
        buffer.copy_(kept[name])
    return parameters | {name: buffer for name, buffer in kept.items() if buffer.is_floating_point()}


def flat(weights: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return weights["parameters"] | weights["buffers"]


def answers(engine) -> Tensor:
    """Outputs of the engine in evaluation mode, for the same images on every rank."""
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    engine.eval()
    with torch.no_grad():
        logits = engine(images.half() if engine.fp16_enabled() else images)
    engine.train()
    return logits.float()


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]
    return [tree] if isinstance(tree, Tensor) else []


def on_rank_0_alone(engine, ema: Ema, expected: list[Tensor]) -> bool:
    """Whether rank 0 gets these tensors and the others none, where only rank 0 keeps them; the same on every rank."""
    keeps = dist.get_rank() == 0
    ema._keeps = keeps
    mine = leaves({"model": engine_state.EngineState(engine, keeps=keeps).state_dict(), "ema": ema.state_dict()})
    ema._keeps = True
    right = all(map(torch.equal, mine, expected)) and len(mine) == (len(expected) if keeps else 0)
    answers: list = [None] * dist.get_world_size()
    dist.all_gather_object(answers, right)
    return all(answers)


def case(stage: int, precision: str) -> dict:
    engine, ema = make(stage, precision)
    average = whole(engine)
    for index in range(STEPS):
        step(engine, ema, index)
        share = min(DECAY, (1 + index) / (10 + index))
        average = {name: share * average[name] + (1 - share) * now for name, now in whole(engine).items()}
    engine_state.average_buffers(engine)
    last, plain = whole(engine), answers(engine)
    state = engine_state.EngineState(engine).state_dict()
    for name in sorted(average.keys() - state["parameters"].keys()):
        dist.all_reduce(average[name])
        average[name] /= dist.get_world_size()
    saved = ema.state_dict()
    assert saved is not None
    snapshot = leaves({"model": state, "ema": saved})
    kept = [leaf.clone() for leaf in snapshot]
    alone = on_rank_0_alone(engine, ema, snapshot)
    with ema.shown():
        shown, seen = whole(engine), answers(engine)
    network = sew_resnet.build(ModelConfig(neuron="plif"), num_classes=5, image_size=8).eval()
    network.load_state_dict(flat(saved))
    with torch.no_grad():
        plainly = network(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(7)))
    after, again = whole(engine), answers(engine)
    resumed, its_ema = make(stage, precision, seed=1)
    engine_state.EngineState(resumed).load_state_dict(state)
    its_ema.load_state_dict(saved)
    for one, its_own in ((engine, ema), (resumed, its_ema)):
        step(one, its_own, STEPS)
    ours, theirs = ema.state_dict(), its_ema.state_dict()
    assert ours is not None
    assert theirs is not None
    return {
        "case": f"{stage} {precision}",
        "off": max((flat(saved)[name] - value).abs().max().item() for name, value in average.items()),
        "moved": max((flat(saved)[name] - value).abs().max().item() for name, value in last.items()),
        "shown is saved": all(torch.equal(flat(saved)[name], value) for name, value in shown.items()),
        "answers": (seen - plainly).abs().max().item(),
        "other answers": (seen - plain).abs().max().item(),
        "last is back": same(last, after) and torch.equal(plain, again),
        "rank 0 alone": alone,
        "snapshot": all(torch.equal(now, then) for now, then in zip(snapshot, kept, strict=True)),
        "resumed": same(flat(ours), flat(theirs)) and same(whole(engine), whole(resumed)),
    }


def main() -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    torch.set_num_threads(1)
    accelerator: Any = get_accelerator()
    accelerator.is_fp16_supported = lambda: True  # few CPUs have fp16; torch emulates it, slowly
    for stage, precision in CASES:
        tell("CASE", case(stage, precision))
    leave()


if __name__ == "__main__":
    main()
