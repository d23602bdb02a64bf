"""The width of every layer's surrogate, from its first value to the one of the next step. Only this file sets it.

    start      from the configuration, or calibrated on a batch, or from another run
    step       what the step measured → controller.py → the vector that the kernels read

It also sets the amplitudes of `model.scale=rms`, which follow the widths, and holds what a decision needs beside the
indicators (potential_stats.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.chi import controller
from pipeline.chi.controller import ControllerState
from pipeline.chi.indicators import Indicators
from pipeline.chi.policies import Evidence
from pipeline.chi.potential_stats import Layer, PotentialStats
from pipeline.config import ChiConfig
from pipeline.snn.membrane_probe import probed
from pipeline.snn.neurons import NeuronState

CALIBRATION_SAMPLES = 1 << 20
"""Most neuron-steps of a layer over which a calibration takes its quantile."""
TIED = 0.01
"""Share of equal distances from which on it matters on which side of them a width lies."""
JUST_ABOVE = 1.001
"""Times a width: over it, also after the controller's logarithm and exponential."""


class Decision(NamedTuple):
    """What one decision saw and did."""

    evidence: Evidence
    """Means over the steps since the last decision."""
    log_width: Tensor
    """`(L,)` float64, ln w after it."""
    progress: float
    """Where in the run it was made, in [0, 1]."""


class Widths:
    """Sets `neurons.widths` and `neurons.amplitudes`; nothing else does.

    Args:
        config: policy, indicator, targets and limits.
        layers: the network's spiking layers, in forward order.
        neurons: the vectors of these layers (`snn.neurons.bind`), with the widths to start from.
    """

    def __init__(self, config: ChiConfig, layers: Sequence[Layer], neurons: NeuronState) -> None:
        self.config, self.neurons = config, neurons
        self.stats = PotentialStats(config, layers, neurons)
        """What the policy and the surrogate's scale need beside the indicators; the tap sends it along."""
        self.controller: ControllerState = controller.start(neurons.widths)

    def start_from(self, widths: Tensor) -> None:
        """Before the first step: starts from other widths `(L,)`, such as another run's."""
        self.controller = controller.start(widths)
        self._apply()

    def calibrate(self, network: nn.Module, images: Tensor, agree: Callable[[Tensor], object] | None = None) -> Tensor:
        """Before the first step: sets each layer's width so that the coverage of a batch is at its target.

        Args:
            network: its batch statistics and modes stay as they were; its counters are zero afterwards.
            images: one batch.
            agree: makes the widths `(L,)` the same on every rank, in place.

        Returns:
            Coverage `(L,)` float64 of this rank's batch at the width chosen from it; NaN for a layer that the batch
            does not reach, or without a finite potential there, which keeps its width. Potentials that are all the same
            are covered or not together, and a width has its limits: so it may be off the target.
        """
        targets = controller.targets_at(self.config, 0.0, self.controller.log_width)
        distances = _distances(network, images, self.neurons)
        limits = self.config.width_min, self.config.width_max
        widths, coverage = self.neurons.widths.clone(), torch.full_like(targets, torch.nan)
        for layer, (values, target) in enumerate(zip(distances, targets.tolist(), strict=True)):
            if len(values):
                widths[layer] = width_at(values, target, self.config.floor_coverage).clamp(*limits)
                coverage[layer] = (values < widths[layer]).double().mean()
        if agree is not None:
            agree(widths)
        self.start_from(widths)
        return coverage

    def step(self, indicators: Indicators | None, progress: float) -> Decision | None:
        """After every step: takes in what the step measured and sets the next step's widths.

        Args:
            indicators: of the step, the same on every rank; None where its update was skipped.
            progress: where in the run the step ends, in [0, 1].

        Returns:
            The decision, on the steps that make one.
        """
        self.stats.hold_amplitudes()
        evidence = None if indicators is None else self.stats.evidence(indicators)
        self.controller, mean = controller.steer(self.config, self.controller, evidence, progress)
        self._apply()
        return None if mean is None else Decision(mean, self.controller.log_width, progress)

    def state_dict(self) -> dict:
        """What a checkpoint holds of the widths, on the CPU."""
        return {**self.controller.state_dict(), **self.neurons.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Go on from another's `state_dict()`: same widths, same next decision."""
        self.controller = ControllerState.from_state_dict(state, self.neurons.widths.device)
        self.neurons.load_state_dict(state)
        self._apply()

    def _apply(self) -> None:
        self.neurons.widths.copy_(self.controller.widths)
        self.stats.prepare(self.controller.count)


@contextmanager
def in_training_mode(network: nn.Module) -> Iterator[None]:
    """For passes that measure: training mode, and afterwards the modes and the buffers of before.

    Parts of a network in training mode that are in evaluation mode, as frozen ones, stay in it.
    """
    modes = [(module, module.training) for module in network.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module, _ in modes
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        if not network.training:
            network.train()  # a DeepSpeed engine's returns None
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, values in buffers:  # the pass may have put another tensor in a buffer's place
                module._buffers[name] = buffer.copy_(values)


@torch.no_grad()
def _distances(network: nn.Module, images: Tensor, neurons: NeuronState) -> list[Tensor]:
    """|h - v_th| of each layer over one forward pass of `images`, flat, thinned; where finite."""
    seen: list[list[Tensor]] = [[torch.empty(0, device=neurons.widths.device)] for _ in neurons.neurons]
    with in_training_mode(network), probed(neurons.neurons, lambda layer, u: seen[layer].append(thinned(u).abs())):
        network(images)
    neurons.zero_counts()
    return [values[values.isfinite()] for values in (thinned(torch.cat(steps)) for steps in seen)]


def thinned(values: Tensor) -> Tensor:
    """At most CALIBRATION_SAMPLES of the values, evenly: all layers' potentials do not fit beside a large network."""
    return values.flatten()[:: max(1, -(-values.numel() // CALIBRATION_SAMPLES))]


def width_at(distances: Tensor, target: float, floor: float) -> Tensor:
    """The width w, 0-d fp32, at which the share of `distances` below w is nearest to `target`, and at least `floor`.

    Args:
        distances: `(n,)`, n at least 1, finite. Many may be equal, such as those of silent neurons: v_th.
        target: in (0, 1).
        floor: in [0, 1): from fewer neurons no gradient comes that is worth a step, so more are taken, however many.
    """
    rank = max(1, round(target * len(distances)))
    # On a GPU kthvalue has no deterministic form. On a CPU it is several times faster than a sort.
    w = distances.sort().values[rank - 1] if distances.is_cuda else distances.kthvalue(rank).values
    below, up_to = (distances < w).double().mean().item(), (distances <= w).double().mean().item()
    nearer = up_to - target < target - below or below < floor
    return (w * JUST_ABOVE if nearer and up_to - below > TIED else w).float()
