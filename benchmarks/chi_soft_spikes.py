"""Networks that train with soft spikes at a random share of their neurons, and are judged with hard ones.

A soft spike is the integral of the surrogate, F(u) = ∫ g from -∞ to u with u = h - v_th: 0 and 1 outside the effective
domain, as the hard one, and between the two inside it. It takes the place of the hard spike in what a neuron emits;
its reset and its gradient stay those of the hard one. The share p of a layer keeps p × coverage, the share of
neuron-steps whose output is another one, at a budget.

Source: Wang et al., "Adaptive Smoothing Gradient Learning for Spiking Neural Networks", ICML 2023, which also learns
the width. `benchmarks.chi_falsifiers` has the trial; its protocol and verdict are in docs/chi_study.md.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.chi_study_arms import FIXED
from benchmarks.chi_study_run import DATA, Elsewhere, accuracy, augmented, drawn_for, images_of, logits, run
from pipeline import chi
from pipeline.snn import surrogate
from pipeline.snn.networks.network import Network
from pipeline.snn.neurons import Neuron

TRIAL, AGAIN = "soft", "again"
BUDGETS = (0.0, 0.05, 0.2)
SEEDS = range(6)
AGAIN_SEEDS = range(6, 14)
"""None of them had a part in what was found in the first trial."""
LONGER = 18
"""Epochs of the hard runs that have the time of a soft one, if a soft step took half as long again as a hard one."""
PLACE = {"where": "CIFAR-10, 5,000 images, 12 epochs", "num_images": 5_000, "epochs": 12, "T": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Softened(Elsewhere):
    """A setting with soft spikes."""

    budget: float
    """p × coverage, 0 to 1; 0: all spikes are hard."""


def settings() -> Iterator[Softened]:
    """Every run, seed by seed: first the hard ones with those of the largest budget, then the others."""
    for budgets in ((BUDGETS[0], BUDGETS[-1]), BUDGETS[1:-1]):
        for seed in SEEDS:
            for budget in budgets:
                yield softened(TRIAL, seed, budget)


def settings_again() -> Iterator[Softened]:
    """Every run of the second trial: on each new seed hard spikes, the largest budget, and hard spikes for longer."""
    for seed in AGAIN_SEEDS:
        yield softened(AGAIN, seed, 0.0)
        yield softened(AGAIN, seed, BUDGETS[-1])
        yield softened(AGAIN, seed, 0.0, where=f"CIFAR-10, 5,000 images, {LONGER} epochs", epochs=LONGER)


def softened(arm: str, seed: int, budget: float, **place) -> Softened:
    return Softened(arm=arm, lr=0.2, seed=seed, policy=FIXED, budget=budget, **{**PLACE, **place})


def integral(u: Tensor, width: Tensor) -> Tensor:
    """F(u) of the triangle of area 1, in [0, 1], of u's shape.

    Args:
        u: h - v_th.
        width: w > 0, 0-d.
    """
    ratio = (u / width).clamp(-1, 1)
    return 0.5 + ratio * (1 - ratio.abs() / 2)


class SoftNeuron(Neuron):
    """A layer of `Neuron`, a random share of which emits soft spikes in training passes while `budget` is above 0.

    The share is budget / coverage of the pass, at most 1. A neuron that is chosen is so at all time steps of a pass;
    the choice is a function of seed, layer and number of the pass.
    """

    def __init__(self, neuron: Neuron, budget: float, seed: int, layer: int) -> None:
        super().__init__(neuron.rule, width=neuron.width, tau=neuron.tau)
        assert (neuron.w, self.rule.shape, self.rule.scale) == (None, "triangle", "area")
        self.budget = budget
        self.generator = torch.Generator().manual_seed(1000 * seed + layer)

    def after_norm(self, y, bn, num_steps, *, static=False, shortcut=None, again=None):
        """As `Neuron.after_norm`."""
        if not (self.training and self.budget):
            return super().after_norm(y, bn, num_steps, static=static, shortcut=shortcut, again=again)
        seen: list[Tensor] = []
        self.probe = seen.append
        try:
            out = super().after_norm(y, bn, num_steps, static=static, shortcut=shortcut, again=again)
        finally:
            self.probe = None
        with torch.no_grad():
            u, width = torch.cat(seen), self.scalars(y)[0]
            share = self.budget / surrogate.covered(u, width).float().mean()
            chosen = torch.empty_like(seen[0]).uniform_(generator=self.generator) < share
            hard = out.to(u.dtype) if shortcut is None else out.to(u.dtype) - shortcut
            change = torch.cat([chosen] * num_steps) * (integral(u, width) - hard)
        return out + change.to(out.dtype)


def soften(network: Network, budget: float, seed: int) -> None:
    """Gives every layer of a fresh network soft spikes; with budget 0 it stays as it is."""
    if not budget:
        return
    for index, layer in enumerate(network.spiking_layers()):
        assert isinstance(layer.neuron, Neuron)
        network.set_submodule(layer.name, SoftNeuron(layer.neuron, budget, seed, index))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            # For the backward pass the networks keep spikes in one to four bits, in the place of what a convolution
            # got. Of a copy they do not know, so that it is kept as it is.
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(),))


def with_hard_statistics(network: Network, images: Tensor, precision: str, batch: int) -> Network:
    """A copy whose batch normalisations have the mean statistics of hard passes over whole batches of `images`."""
    network = copy.deepcopy(network)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in network.modules():
        if isinstance(module, SoftNeuron):
            module.budget = 0.0
    network.train()
    with torch.no_grad():
        for number, part in enumerate(images[: len(images) // batch * batch].split(batch), 1):
            for norm in norms:
                norm.momentum = 1 / number
            logits(network, part, precision)
    return network


def run_one(setting: Softened, scratch: Path) -> dict:
    """Trains one network; accuracies are of hard spikes.

    Returns:
        The setting with its results: `accuracy` and `train_accuracy` with the statistics of batch normalisation as
        training left them, `hard_accuracy` and `hard_train_accuracy` with those of hard passes.
    """
    images, labels = images_of(scratch / setting.data, "train", setting.image_size)
    num_train = DATA[setting.data][0]
    numbers = drawn_for(setting, num_train)
    inside, outside = (images[numbers], labels[numbers]), (images[num_train:], labels[num_train:])
    last = setting.epochs * (setting.num_images // setting.batch)
    found = {}

    def watch(step: int, network: Network, _: chi.Pilot) -> None:
        if step == last:
            moved = augmented(inside[0], torch.Generator().manual_seed(setting.seed))
            hard = with_hard_statistics(network, moved, setting.precision, setting.batch)
            found["train_accuracy"] = accuracy(network, *inside, setting.precision)
            found["hard_train_accuracy"] = accuracy(hard, *inside, setting.precision)
            found["hard_accuracy"] = accuracy(hard, *outside, setting.precision)

    record = run(setting, scratch, watch, lambda network: soften(network, setting.budget, setting.seed))
    del record["course"]
    return {**record, **found}
