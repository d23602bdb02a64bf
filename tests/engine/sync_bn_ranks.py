"""Run on every rank by test_sync_bn.py: networks that normalise over ranks, against one process with the joint batch.

Rank 0 prints one JSON line for each comparison.
"""

import copy
import itertools
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config import Config, DataConfig, ModelConfig, TrainConfig
from pipeline.engine.engine import build, normalise_as_one
from pipeline.snn.kernels import compiled, norm
from pipeline.snn.kernels.norm import Ranks
from pipeline.snn.kernels.reference import Rule
from pipeline.snn.losses import cross_entropy
from pipeline.snn.networks.build import build as build_network
from pipeline.snn.neurons import bind
from tests.support.rank_lines import leave, tell

MICRO_BATCH, STEPS = 3, 2


def over_ranks(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor


def everyones(tensor: Tensor) -> Tensor:
    """The ranks' tensors, concatenated along the batch."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def network_in_doubles(neuron: str, again: bool, arch: str = "sew_tiny") -> dict:
    """Two SGD steps of a whole network on the reference: weights and running statistics, largest difference."""
    torch.manual_seed(0)
    model = ModelConfig(arch=arch, neuron=neuron, checkpoint=again)
    ours = build_network(model, num_classes=5, image_size=8).double()
    joint, apart = copy.deepcopy(ours), copy.deepcopy(ours)
    normalise_as_one(bind(ours), dist.get_world_size())
    bind(joint)
    bind(apart)
    torch.manual_seed(1 + dist.get_rank())
    for _ in range(STEPS):
        images, labels = torch.randn(MICRO_BATCH, 3, 8, 8).double(), torch.randint(5, (MICRO_BATCH,))
        for net, x, y, averaged in (
            (ours, images, labels, True),
            (joint, everyones(images), everyones(labels), False),
            (apart, images, labels, True),
        ):
            net.zero_grad()
            cross_entropy(net(x), y).backward()
            with torch.no_grad():
                for parameter in net.parameters():
                    assert parameter.grad is not None
                    if averaged:
                        dist.all_reduce(parameter.grad)
                        parameter.grad /= dist.get_world_size()
                    parameter -= 0.1 * parameter.grad
    return {"kind": f"network {arch} {neuron} {again}", "off": off(ours, joint), "apart": off(apart, joint)}


def off(ours: torch.nn.Module, theirs: torch.nn.Module) -> float:
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def layer(run, dtype: torch.dtype, static: bool, T: int = 4) -> dict:
    """One layer in `dtype` by `run`, against the definition on the joint batch: output and gradients."""
    torch.manual_seed(10 + dist.get_rank())
    y = (torch.randn(T, MICRO_BATCH, 16, 5, 7) * 2 + 5).to(dtype)  # far from 0, where a variance loses digits
    y = y[0] if static else y
    weight = torch.randn(T, MICRO_BATCH, 16, 5, 7).to(dtype)
    axis = 0 if static else 1
    joint_y, joint_weight = (everyones(t.movedim(a, 0)).movedim(0, a) for t, a in ((y, axis), (weight, 1)))
    results = []
    for op, x, w, ranks in (
        (run, y, weight, Ranks(count=dist.get_world_size(), sum=over_ranks)),
        (norm.run_reference, joint_y, joint_weight, None),
    ):
        bn = torch.nn.BatchNorm2d(16).to(dtype)
        x = x.clone().requires_grad_()
        flat = x if static else x.flatten(0, 1)
        width = torch.tensor(0.8, dtype=dtype)
        out = op(flat, bn, Rule(), width, torch.ones_like(width), num_steps=T, static=static, ranks=ranks)
        (out * w.flatten(0, 1)).sum().backward()
        grads = [x.grad, bn.weight.grad, bn.bias.grad]
        results.append((out.unflatten(0, (T, -1)), grads, [bn.running_mean, bn.running_var]))
    (out, (gx, *by_channel), stats), (out_, (gx_, *by_channel_), stats_) = results
    here = slice(MICRO_BATCH * dist.get_rank(), MICRO_BATCH * (dist.get_rank() + 1))
    summed = [over_ranks(g.clone()) for g in by_channel]
    pairs = [(out, out_[:, here]), (gx, gx_[here] if static else gx_[:, here])]
    pairs += [*zip(summed, by_channel_, strict=True), *zip(stats, stats_, strict=True)]
    return {
        "kind": f"layer {run.__name__} {str(dtype).removeprefix('torch.')} {static}",
        "off": [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs],
    }


def engine(stage: int, arch: str = "sew_tiny") -> dict:
    """Steps of a DeepSpeed engine: every rank ends with the same running statistics, which no rank alone has."""
    torch.manual_seed(0)
    network: Any = build_network(ModelConfig(arch=arch), num_classes=5, image_size=8)
    world_size = dist.get_world_size()
    data = DataConfig(global_batch=MICRO_BATCH * world_size, micro_batch=MICRO_BATCH, image_size=8)
    built = build(
        Config(recipe="sync", data=data, train=TrainConfig(zero_stage=stage, sync_bn=True)), network, world_size
    )
    normalise_as_one(bind(network), world_size)
    torch.manual_seed(1 + dist.get_rank())
    for _ in range(STEPS):
        logits = built(torch.randn(MICRO_BATCH, 3, 8, 8))
        built.backward(cross_entropy(logits, torch.randint(5, (MICRO_BATCH,))))
        built.step()
    mean = network.bn1.running_mean
    assert mean is not None
    means = everyones(mean[None])
    return {"kind": f"engine {arch} {stage}", "same": bool((means == means[0]).all()), "moved": mean.norm().item()}


def main() -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    torch.set_num_threads(1)
    results = [network_in_doubles("if", False), network_in_doubles("plif", True)]
    results += [network_in_doubles("lif", True, "ms_tiny")]
    runs = ((norm.run_reference, torch.float64), (norm.run_reference, torch.float32), (norm.run, torch.float32))
    results += [layer(run, dtype, static) for (run, dtype), static in itertools.product(runs, (False, True))]
    results += [*(engine(stage) for stage in (0, 1, 2, 3)), engine(3, "ms_tiny")]
    for result in results:
        tell("CASE", result)
    tell("CASE", {"kind": "twin", "there": compiled.library(torch.zeros(4)) is not None})
    leave()


if __name__ == "__main__":
    main()
