"""Run on every rank by test_tap.py: the tap against two independent counts, over a matrix of engines.

The engines and their network are chi_engines.py's. Each case prints one JSON line from rank 0. The argument
`short` runs only a few cases.
"""

import contextlib
import itertools
import sys
from collections.abc import Sequence
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_grad

from pipeline.chi import comm_hook, small_allreduce
from pipeline.chi.comm_hook import TapError
from pipeline.chi.indicators import PER_LAYER
from pipeline.chi.potential_stats import PotentialStats
from pipeline.chi.tap import FLAGS, Tap
from pipeline.config import ChiConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from pipeline.engine.engine import build
from pipeline.engine.engine_state import EngineState
from pipeline.errors import ConfigError, NonFiniteError
from pipeline.snn.kernels.reference import Rule
from pipeline.snn.membrane_probe import probed
from pipeline.snn.networks import sew_resnet
from pipeline.snn.neurons import bind
from tests.chi.chi_engines import MICRO_BATCH, Counter, batches, make, parameters, plain_gradient, step
from tests.support.rank_lines import tell

STEPS = 2
STAGES, PRECISIONS = (0, 1, 2, 3), (("fp32", 1), ("fp32", 2), ("bf16", 2), ("fp16", 2))
SHORT = (("fp32", 2), ("fp16", 1))
CLIP = 0.01


def case(stage: int, precision: str, accumulation: int) -> dict:
    rank = dist.get_rank()
    engine, module, tap = make(stage, precision, accumulation, tapped=True)
    assert tap is not None
    result = {"stage": stage, "precision": precision, "accumulation": accumulation, "steps": []}
    for index in range(STEPS):
        data = batches(rank, accumulation, index)
        plain = plain_gradient(engine, data, precision)
        full: dict[str, torch.Tensor] = {}

        def inspect(full=full) -> None:
            for name, parameter in module.named_parameters():
                gradient = safe_get_full_grad(parameter)
                assert gradient is not None
                full[name] = gradient.clone()

        tap.flags[FLAGS.index("bad_samples")] = rank + 1
        step(engine, data, tap, inspect)
        reading = tap.read()
        while reading.skipped:  # fp16: the first loss scale overflows on more ranks
            plain = plain_gradient(engine, data, precision)
            step(engine, data, tap, inspect)
            reading = tap.read()
        both = []
        for source in (plain, full):
            layers = [source["conv1.weight"].double(), source["conv2.weight"].double()]
            both.append(
                {
                    "chi": [(g != 0).sum().item() / g.numel() for g in layers],
                    "participation": [(g.abs().sum() ** 2 / (g.numel() * (g * g).sum())).item() for g in layers],
                    "network_chi": sum((g != 0).sum().item() for g in source.values())
                    / sum(g.numel() for g in source.values()),
                }
            )
        result["steps"].append(
            {
                **{name: getattr(reading.indicators, name).tolist() for name in PER_LAYER},
                "network_chi": reading.indicators.network_chi.item(),
                "plain": both[0],
                "full": both[1],
                "bad_samples": reading.flags[FLAGS.index("bad_samples")].item(),
            }
        )
    with Counter() as counter:  # not in the first step, which runs the self-check
        step(engine, batches(rank, accumulation, STEPS), tap)
        tap.read()
    bare, _, _ = make(stage, precision, accumulation, tapped=False)
    for index in range(STEPS):
        step(bare, batches(rank, accumulation, index), None)
    with Counter() as bare_counter:
        step(bare, batches(rank, accumulation, STEPS), None)
    result["calls_with"], result["calls_without"] = counter.calls, bare_counter.calls
    result["extra_bytes"] = counter.bytes - bare_counter.bytes
    result["extra_waits"] = counter.waits - bare_counter.waits
    return result


def guards(stage: int) -> dict:
    """The errors of `check` for a gradient that is NaN on rank 1 alone, and for one that was counted wrongly."""
    said: dict[str, object] = {"stage": stage}
    for kind in ("nan", "miscounted"):
        engine, _, tap = make(stage, "fp32", 1, tapped=True)
        assert tap is not None
        before = parameters(engine)
        ((images, labels),) = batches(dist.get_rank(), 1, 0)
        if kind == "nan" and dist.get_rank() == 1:
            images[0] = float("nan")
        try:
            with one_too_many() if kind == "miscounted" else contextlib.nullcontext():
                step(engine, [(images, labels)], tap)
                tap.read()
        except (NonFiniteError, TapError) as error:
            said[kind] = f"{type(error).__name__}: {error}"
        unchanged = all(torch.equal(old, new) for old, new in zip(before, parameters(engine), strict=True))
        said[f"{kind} left the weights alone"] = unchanged
    return said


def clipped(stage: int, precision: str) -> dict:
    """One step in which clipping takes effect, beside the plain gradient."""
    engine, _, tap = make(stage, precision, clip=CLIP)
    assert tap is not None
    data, before = batches(dist.get_rank(), 1, 0), parameters(engine)
    plain = plain_gradient(engine, data, precision)
    step(engine, data, tap)
    indicators = tap.read().indicators
    moved = torch.cat([(new - old).flatten() for old, new in zip(before, parameters(engine), strict=True)])
    layers = [plain["conv1.weight"].double(), plain["conv2.weight"].double()]
    return {
        "stage": stage,
        "precision": precision,
        "chi": indicators.chi.tolist(),
        "participation": indicators.participation.tolist(),
        "grad_norm": indicators.grad_norm.tolist(),
        "plain_chi": [(g != 0).double().mean().item() for g in layers],
        "plain_participation": [(g.abs().sum() ** 2 / (g.numel() * (g * g).sum())).item() for g in layers],
        "plain_norm": [g.norm().item() for g in layers],
        "moved": moved.norm().item() / OptimConfig().lr,
    }


def overflows(stage: int) -> dict:
    """fp16: a step whose gradient overflows (on rank 1 alone, if there is one), and the step after it."""
    engine, _, tap = make(stage, "fp16")
    assert tap is not None
    before, scale = parameters(engine), engine.optimizer.loss_scale
    ((images, labels),) = batches(dist.get_rank(), 1, 0)
    if dist.get_rank() == dist.get_world_size() - 1:
        images[:, 0] = 6e4
    tap.flags[FLAGS.index("stop")] = dist.get_rank()
    step(engine, [(images, labels)], tap)
    first = tap.read()
    said = {
        "stage": stage,
        "skipped": first.skipped,
        "defined": {name: getattr(first.indicators, name).isfinite().any().item() for name in PER_LAYER},
        "stop": first.flags[FLAGS.index("stop")].item(),
        "unchanged": all(torch.equal(old, new) for old, new in zip(before, parameters(engine), strict=True)),
        "scale_ratio": engine.optimizer.loss_scale / scale,
    }
    data = batches(dist.get_rank(), 1, 1)
    plain = plain_gradient(engine, data, "fp16")
    step(engine, data, tap)
    second = tap.read()
    fresh, _, its_tap = make(stage, "fp16")
    assert its_tap is not None
    step(fresh, data, its_tap)
    alone = its_tap.read()
    return said | {
        "then_skipped": second.skipped,
        "then_chi": second.indicators.chi.tolist(),
        "then_norm": second.indicators.grad_norm.tolist(),
        "plain_chi": [(plain[f"conv{i}.weight"] != 0).double().mean().item() for i in (1, 2)],
        "plain_norm": [plain[f"conv{i}.weight"].double().norm().item() for i in (1, 2)],
        "same_rates": torch.equal(second.indicators.firing_rate, alone.indicators.firing_rate),
    }


def hopeless(stage: int) -> list[dict]:
    """fp16: readings of a gradient that is not finite on one rank, at the loss scales 2 and 1."""
    engine, module, _ = make(stage, "fp16", tapped=False)
    tap = Tap(engine, module.spiking_layers(), bind(module), skips=True)
    scaler = engine.optimizer.loss_scaler if stage else engine.optimizer.loss_scale_config
    said = []
    for scale in (2.0, 1.0):
        scaler.cur_scale = scale
        ((images, labels),) = batches(dist.get_rank(), 1, 0)
        if dist.get_rank() == dist.get_world_size() - 1:
            images[0] = float("nan")
        step(engine, [(images, labels)], tap)
        reading = tap.read()
        said.append({"stage": stage, "scale": scale, "skipped": reading.skipped, "nonfinite": reading.nonfinite})
    return said


def sew(precision: str) -> dict:
    """Two steps of the real network, with BatchNorm: the losses and the running statistics."""
    torch.manual_seed(0)
    module = sew_resnet.build(ModelConfig(), num_classes=4, image_size=8)
    config = Config(
        recipe="matrix",
        data=DataConfig(global_batch=MICRO_BATCH * dist.get_world_size(), micro_batch=MICRO_BATCH, image_size=8),
        train=TrainConfig(zero_stage=2, precision=precision),
    )
    engine = build(config, module, dist.get_world_size())
    tap = Tap(engine, module.spiking_layers(), bind(module))
    losses = []
    for index in range(2):
        step(engine, batches(dist.get_rank(), 1, index), tap)
        reading = tap.read()
        losses.append(reading.loss.item())
    means = module.bn1.running_mean
    assert means is not None
    return {
        "precision": precision,
        "losses": losses,
        "skipped": reading.skipped,
        "chi": reading.indicators.network_chi.item(),
        "bn_weight": str(module.bn1.weight.dtype),
        "bn_mean": str(means.dtype),
        "mean": means.norm().item(),
        "tracked": int(module.bn1.num_batches_tracked),  # pyright: ignore[reportArgumentType]
    }


def mean_squares(stage: int) -> dict:
    """What ds_atgo and scale rms need, over two steps of the same images and weights, the second at half the width."""
    engine, module, _ = make(stage, "fp32", tapped=False, rule=Rule(scale="rms"), lr=1e-18)
    neurons, data = bind(module), batches(dist.get_rank(), 1, 0)
    spread = PotentialStats(ChiConfig(policy="ds_atgo", interval=1), module.spiking_layers(), neurons)
    tap = Tap(engine, module.spiking_layers(), neurons, spread=spread)
    squares: list[list[torch.Tensor]] = [[], []]
    with torch.no_grad(), probed(neurons.neurons, lambda layer, u: squares[layer].append(u.square().mean())):
        engine(data[0][0])
    neurons.zero_counts()
    plain = torch.tensor([torch.stack(seen).mean().item() for seen in squares], dtype=torch.float64)
    dist.all_reduce(plain)
    said: dict = {"stage": stage, "plain": (plain / dist.get_world_size()).sqrt().tolist(), "seen": [], "sums": []}
    for width in (0.5, 0.25):
        neurons.widths.fill_(width)
        spread.prepare(0)
        step(engine, data, tap)
        sums = neurons.grad_sq.clone()
        dist.all_reduce(sums)
        reading = tap.read()
        spread.hold_amplitudes()
        seen = spread.evidence(reading.indicators).spread
        assert seen is not None
        said["seen"].append(seen.tolist())
        said["sums"].append(sums.tolist())
    return said | {"amplitudes": neurons.amplitudes.tolist()}


def refused() -> list[str]:
    """The errors for fp16 by torch_autocast, and for fp16 on a device without it."""
    said = []
    engine, module, _ = make(1, "bf16", tapped=False)
    engine._config.torch_autocast_dtype = torch.float16
    with pytest.raises(ConfigError) as refusal:
        Tap(engine, module.spiking_layers(), bind(module))
    said.append(str(refusal.value))
    compute_in_fp16(False)
    with pytest.raises(ConfigError) as refusal:
        make(1, "fp16")
    return [*said, str(refusal.value)]


def compute_in_fp16(claimed: bool) -> None:
    """DeepSpeed requires fp16 instructions, which few CPUs have; torch computes without them, slowly."""
    accelerator: Any = get_accelerator()
    accelerator.is_fp16_supported = lambda: claimed


def resumes(stage: int, precision: str, **optim: Any) -> dict:
    """Whether an engine that takes over another's checkpoint makes the same next step, bit for bit."""
    engine, _, tap = make(stage, precision, **optim)
    step(engine, batches(dist.get_rank(), 1, 0), tap)
    saved = EngineState(engine).state_dict()
    resumed, fresh, its_tap = make(stage, precision, **optim)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.data.fill_(7)  # nothing of its own start may be left
    EngineState(resumed).load_state_dict(saved)
    for one, its_own in ((engine, tap), (resumed, its_tap)):
        step(one, batches(dist.get_rank(), 1, 1), its_own)
    pairs = zip(parameters(engine), parameters(resumed), strict=True)
    return {
        "stage": stage,
        "precision": precision,
        "slots": {slot: sorted(tensors) for slot, tensors in saved["optimizer"].items()},
        "groups": len(engine.basic_optimizer.param_groups),
        "same": all(torch.equal(ours, theirs) for ours, theirs in pairs),
    }


def one_too_many() -> contextlib.ExitStack:
    """While it is open, the first part of a gradient that is counted has one non-zero element too many."""
    left, count, faults = [1], comm_hook.sums_of_each, contextlib.ExitStack()

    def wrong(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        sums = count(gradients)
        if left:
            sums[0, 0] += left.pop()
        return sums

    for carrier in (comm_hook, small_allreduce):
        faults.enter_context(mock.patch.object(carrier, "sums_of_each", wrong))
    return faults


def main() -> int:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    torch.set_num_threads(1)
    compute_in_fp16(True)
    short = "short" in sys.argv
    for stage, (precision, accumulation) in itertools.product(STAGES, SHORT if short else PRECISIONS):
        tell("CASE", case(stage, precision, accumulation))
    for stage in () if short else STAGES:
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, guards(stage))
        tell("GUARD", everyone)
        dist.all_gather_object(everyone, overflows(stage))
        tell("OVERFLOW", everyone)
        tell("HOPELESS", hopeless(stage))
        for precision in ("fp32", "fp16"):
            tell("CLIP", clipped(stage, precision))
            tell("RESUME SGD", resumes(stage, precision))
            if precision == "fp32" or stage == 0:
                # Some weights decay and some do not, so DeepSpeed has two groups, each with its own partitions.
                tell("RESUME ADAMW", resumes(stage, precision, name="adamw", lr=0.01, weight_decay=0.1))
    tell("RESUME PLAIN", resumes(1, "fp32", momentum=0.0))
    if not short:
        for precision in ("fp32", "fp16"):
            tell("SEW", sew(precision))
        for stage in (1, 2):
            tell("SQUARES", mean_squares(stage))
        tell("REFUSED", refused())
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
