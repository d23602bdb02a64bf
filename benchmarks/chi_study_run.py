"""One run of the χ studies: a small SEW-ResNet on images of one data set, its widths set by one policy.

This project's loader decodes and scales the images of the shards once; they then stay in memory. `chi.attach` steers
the widths. Training images are numbered in the shards' order, which data_prep has shuffled: the first are for training,
the rest for choosing (of CIFAR-10's 50,000 the last 10,000). The test split is read only where `split` is "test".
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline import chi
from pipeline.config import DataConfig, ModelConfig
from pipeline.data.loader import evaluation_batches
from pipeline.snn.losses import cross_entropy
from pipeline.snn.networks.build import build
from pipeline.snn.networks.network import Network, SpikingLayer

DATA = {"cifar10": (40_000, 10), "cifar100": (20_000, 100), "digits": (1_078, 10)}
"""By data set: the number of images for training, and of classes."""
MOMENTUM = 0.9
START = (0.25, 4.0)
"""Range of random starting widths, drawn log-uniformly for each layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Everything that a run depends on. Arms differ only in the surrogate and its policy."""

    arm: str
    """Name of the arm."""
    surrogate: str = "triangle"
    scale: str = "area"
    width: float | None = 1.0
    """Width at the start; None draws one for each layer from START."""
    policy: dict
    """Settings of `chi.attach`."""
    lr: float = 0.1
    seed: int = 0
    arch: str = "sew_cifar8"
    T: int = 4
    image_size: int = 16
    num_images: int = 10_000
    epochs: int = 8
    batch: int = 64
    split: str = "held_out"
    """What the result is measured on: held_out or test."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Varied(Setting):
    """Settings that later stages added."""

    jitter: float = 0.0
    """Before every step, ln w of each layer changes by plus or minus this, at random."""
    calibrated: bool = False
    """Start where the coverage of the first batch is at its target."""
    neuron: str = "if"
    precision: str = "bf16"
    """bf16 by autocast, or fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Elsewhere(Varied):
    """Settings in which users differ; `where` names their combination."""

    where: str
    data: str = "cifar10"
    connect: str = "add"
    v_th: float = 1.0


def images_of(shards: Path, split: str, image_size: int) -> tuple[Tensor, Tensor]:
    """Every image of a split, `(n, 3, S, S)` bf16, normalised, and labels `(n,)`; decoded once, kept beside it."""
    kept = shards / f"{split}-{image_size}.pt"
    if not kept.exists():
        data = DataConfig(path=str(shards), image_size=image_size, global_batch=500, micro_batch=500, threads=2)
        batches = evaluation_batches(data, rank=0, world_size=1, device=torch.device("cpu"), split=split)
        pairs = [(batch.images[batch.valid].bfloat16(), batch.labels[batch.valid]) for batch in batches]
        images, labels = (torch.cat(column).contiguous() for column in zip(*pairs, strict=True))
        temporary = kept.with_suffix(f".{time.time_ns()}")
        torch.save((images, labels), temporary)
        temporary.replace(kept)
    return torch.load(kept)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image `(n, 3, S, S)` shifted by up to an eighth of its side, and every second one mirrored."""
    n, _, _, side = images.shape
    pad = side // 8
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    top, left = torch.randint(0, 2 * pad + 1, (2, n), generator=generator)
    across = torch.arange(side)
    mirrored = torch.rand(n, generator=generator) < 0.5
    columns = torch.where(mirrored[:, None], across.flip(0), across) + left[:, None]
    rows = across + top[:, None]
    number = torch.arange(n)[:, None, None]
    return padded.permute(0, 2, 3, 1)[number, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def logits(network: torch.nn.Module, images: Tensor, precision: str) -> Tensor:
    """`(T, n, K)` of `images` `(n, 3, S, S)` bf16, by bf16 autocast or in fp32."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        return network(images if precision == "bf16" else images.float())


def accuracy(network: torch.nn.Module, images: Tensor, labels: Tensor, precision: str) -> float:
    network.eval()
    hits = 0
    with torch.no_grad():
        for x, y in zip(images.split(500), labels.split(500), strict=True):
            hits += int((logits(network, x, precision).float().mean(0).argmax(1) == y).sum())
    network.train()
    return hits / len(labels)


def start_widths(seed: int, num_layers: int) -> list[float]:
    """The random widths, one for each layer, from which a run of this seed starts if its setting has no width."""
    drawn = torch.rand(num_layers, generator=torch.Generator().manual_seed(1000 + seed))
    return [START[0] * (START[1] / START[0]) ** u for u in drawn.tolist()]


def model_of(setting: Elsewhere) -> ModelConfig:
    """The network's configuration."""
    names = ("arch", "T", "surrogate", "scale", "neuron", "connect", "v_th")
    return ModelConfig(**{name: getattr(setting, name) for name in names})


def weight_of(layer: SpikingLayer) -> torch.nn.Parameter:
    """W of the convolution that feeds a layer; in these networks every layer has one."""
    assert layer.weight is not None
    return layer.weight


def drawn_for(setting: Setting, num_train: int) -> Tensor:
    """Numbers of the images that a run trains on, the same for every seed."""
    return torch.randperm(num_train, generator=torch.Generator().manual_seed(0))[: setting.num_images]


def run(
    setting: Setting,
    scratch: Path,
    watch: Callable[[int, Network, chi.Pilot], None] | None = None,
    prepare: Callable[[Network], None] | None = None,
) -> dict:
    """Trains one network on the shards in `scratch`; returns the setting with the results.

    `watch` is called with the number of steps done, before each and after the last one, and must change nothing.
    `prepare` may change the fresh network.
    """
    began = time.monotonic()
    varied = setting if isinstance(setting, Elsewhere) else Elsewhere(**{"where": "", **asdict(setting)})
    num_train, num_classes = DATA[varied.data]
    images, labels = images_of(scratch / varied.data, "train", setting.image_size)
    generator = torch.Generator().manual_seed(setting.seed)
    drawn = drawn_for(setting, num_train)
    torch.manual_seed(setting.seed)
    network = build(model_of(varied), num_classes=num_classes, image_size=setting.image_size)
    if prepare is not None:
        prepare(network)
    layers = network.spiking_layers()
    for layer, width in zip(layers, start_widths(setting.seed, len(layers)), strict=True):
        layer.neuron.width = width if setting.width is None else setting.width
    optimizer = torch.optim.SGD(network.parameters(), lr=setting.lr, momentum=MOMENTUM)
    steps = setting.epochs * (setting.num_images // setting.batch)
    pilot = chi.attach(network, optimizer, steps=steps, **setting.policy)
    if varied.calibrated:
        pilot.calibrate(images[drawn[: setting.batch]].float())
    course, losses = [], []
    for step in range(steps):
        if watch is not None:
            watch(step, network, pilot)
        if step % (steps // setting.epochs) == 0:
            order = drawn[torch.randperm(len(drawn), generator=generator)]
        at = step % (steps // setting.epochs) * setting.batch
        chosen = order[at : at + setting.batch]
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * setting.lr * (1 + math.cos(math.pi * step / steps))
        outputs = logits(network, augmented(images[chosen], generator), varied.precision)
        loss = cross_entropy(outputs, labels[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if varied.jitter:
            coins = torch.randn(len(layers), generator=generator).sign()
            pilot.neurons.widths.mul_((varied.jitter * coins).exp())
        losses.append(loss.detach())
        if (step + 1) % (steps // 8) == 0 and pilot.indicators is not None:
            at = {name: getattr(pilot.indicators, name).tolist() for name in ("coverage", "participation", "chi")}
            norms = [weight_of(layer).norm().item() for layer in layers]
            course.append({"step": step + 1, "widths": pilot.neurons.widths.tolist(), "weight_norms": norms, **at})
    if watch is not None:
        watch(steps, network, pilot)
    if setting.split == "held_out":
        measured = images[num_train:], labels[num_train:]
    else:
        measured = images_of(scratch / varied.data, "val", setting.image_size)
    return {
        **asdict(setting),
        "accuracy": accuracy(network, *measured, varied.precision),
        "train_loss": torch.stack(losses[-steps // setting.epochs :]).mean().item(),
        "course": course,
        "seconds": time.monotonic() - began,
    }
