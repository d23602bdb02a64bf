"""`--dry-run`: what a command would train, and the memory it takes, without ranks and without the run's folder."""

import json
import os

import torch

from launch import epoch_time
from launch.devices import num_ranks
from pipeline.config import Config
from pipeline.config.config_json import flatten
from pipeline.data.manifest import EVENTS, IMAGE_CHANNELS, TRAIN, check_flip, check_kind, load_manifest
from pipeline.engine.deepspeed_settings import deepspeed_settings
from pipeline.errors import EXIT_DONE, ConfigError, DataError
from pipeline.snn import memory_estimate
from pipeline.snn.networks.build import build
from pipeline.snn.networks.network import Network

CLASSES = 1000
"""Classes of the network where there are no data here to give their number."""


def show(config: Config, ranks: int) -> int:
    """Prints the report for `ranks` ranks; with 0 for as many as this machine would start."""
    ranks = ranks or int(os.environ.get("WORLD_SIZE", 0)) or num_ranks(config.data, torch.cuda.device_count())
    print("\n".join(report(config, ranks)), flush=True)
    return EXIT_DONE


def report(config: Config, ranks: int) -> list[str]:
    """The lines of the report.

    Raises:
        ConfigError: the batch does not divide over the ranks, or the network cannot be built.
    """
    data, accumulation = config.data, config.accumulation(ranks)
    try:
        manifest, missing = load_manifest(data, TRAIN), ""
    except (ConfigError, DataError) as error:
        manifest, missing = None, str(error)
    if manifest:
        check_kind(data, manifest)
        check_flip(data, manifest)
    steps = config.num_steps(manifest.num_samples) if manifest else None
    num_classes = len(manifest.classes) if manifest else CLASSES
    with torch.device("meta"):
        network = build(
            config.model,
            num_classes=num_classes,
            in_channels=manifest.channels if manifest else IMAGE_CHANNELS,
            image_size=data.image_size,
            image_size_start=data.image_size_start,
            image_size_step=data.image_size_step,
        )
    num_parameters = sum(p.numel() for p in network.parameters())
    lines = ["configuration"]
    lines += [f"  {name} = {value!r}" for name, value in flatten(config.to_dict()).items()]
    settings = json.dumps(deepspeed_settings(config, ranks, num_parameters), indent=2)
    lines += ["DeepSpeed", *(f"  {line}" for line in settings.splitlines())]
    batch = f"{data.global_batch} = {ranks} ranks x {accumulation} micro-batches x {data.micro_batch}"
    lines += [f"batch       {batch}"]
    if manifest:
        lines += [f"steps       {steps}: {config.train.epochs:g} epochs of {manifest.num_samples} samples"]
        lines += [f"time        {epoch_time.line(config, manifest.num_samples)}"]
    else:
        lines += [f"steps       not known: {missing}"]
    if config.cut_off:
        lines += [f"cut off     {config.cut_off}"]
    assumed = "" if manifest else ", assumed"
    lines += [f"parameters  {num_parameters:,} ({num_classes} classes{assumed})"]
    frames = bool(manifest) and manifest.kind == EVENTS
    parts = memory(config, network, num_parameters, ranks, frames=frames)
    lines += ["memory per GPU, estimated from shapes"]
    lines += [f"  {name:<42}{size / 2**20:>12,.1f} MiB" for name, size in parts.items()]
    lines += [f"  {'sum':<42}{sum(parts.values()) / 2**20:>12,.1f} MiB"]
    lines += [
        "  not counted: the device's own context, convolution workspaces, decoded batches that wait, the allocator's "
        "slack"
    ]
    return lines


def memory(
    config: Config, network: Network, num_parameters: int, ranks: int, *, frames: bool = False
) -> dict[str, int]:
    """Bytes on each of `ranks` ranks, by what they hold.

    Parameters and gradients are fp32; with precision fp16 or fp64 they have that type. ZeRO ≥ 1 and fp16 add fp32
    master weights, and ZeRO ≥ 1 the update's gradient in fp32. What a stage shards is divided by the ranks. The bucket
    is the flat copy of all gradients, for the all-reduce. Under bf16 autocast the weights' bf16 copies live as long as
    the activations. `frames`: every time step has images of its own, as of event data.
    """
    stage, precision = config.train.zero_stage, config.train.precision
    number = {"fp16": 2, "fp64": 8}.get(precision, 4)
    share = num_parameters / (ranks if stage else 1)
    kept = max(4, number)
    slots = 2 if config.optim.name == "adamw" else int(config.optim.momentum > 0)
    masters = 4 * share if stage or precision == "fp16" else 0
    side = config.data.image_size
    itemsize = {"fp32": 4, "fp64": 8}.get(precision, 2)
    images = (config.data.micro_batch, network.in_channels, side, side)
    layers = memory_estimate.of(network, (config.model.T, *images) if frames else images, itemsize)
    parts = {
        "parameters": number * num_parameters / (ranks if stage == 3 else 1),
        "gradients": number * num_parameters / (ranks if stage >= 2 else 1) + (4 * share if stage else 0),
        "gradient bucket": number * num_parameters,
        f"optimizer ({config.optim.name}, ZeRO-{stage})": masters + kept * slots * share,
        "moving average of weights": kept * share if config.train.ema_decay else 0,
        "bf16 copies of weights": 2 * num_parameters if precision == "bf16" else 0,
        "activations kept for the backward pass": layers.kept_bytes,
        "the largest layer's backward pass": layers.working_bytes,
    }
    return {name: round(size) for name, size in parts.items() if size}
