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

    def calibrate(self, network: nn.Module, images: Tensor, agree: Callable[[Tensor], object] | None = None) -> None:
        """Before the first step: sets each layer's width so that the coverage of a batch is at its target.

        Args:
            network: its batch statistics and mode stay as they were; its counters are zero afterwards.
            images: one batch.
            agree: makes the widths `(L,)` the same on every rank, in place.
        """
        targets = controller.targets_at(self.config, 0.0, self.controller.log_width)
        widths = _quantiles(network, images, self.neurons, targets)
        if agree is not None:
            agree(widths)
        self.start_from(widths.clamp(self.config.width_min, self.config.width_max))

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
    """For passes that measure: training mode, and afterwards the mode and the buffers of before."""
    kept = {name: buffer.clone() for name, buffer in network.named_buffers()}
    training = network.training
    try:
        network.train()  # a DeepSpeed engine's returns None
        yield
    finally:
        network.train(training)
        with torch.no_grad():
            for name, buffer in network.named_buffers():
                buffer.copy_(kept[name])


@torch.no_grad()
def _quantiles(network: nn.Module, images: Tensor, neurons: NeuronState, targets: Tensor) -> Tensor:
    """w `(L,)` fp32, the `targets[ℓ]`-quantile of |h - v_th| in layer ℓ over one forward pass of `images`."""
    seen: list[list[Tensor]] = [[] for _ in targets]
    with in_training_mode(network), probed(neurons.neurons, lambda layer, u: seen[layer].append(thinned(u).abs())):
        network(images)
    neurons.zero_counts()
    widths = []
    for steps, target, width in zip(seen, targets.tolist(), neurons.widths, strict=True):
        if not steps:  # this batch does not reach the layer
            widths.append(width)
            continue
        distances = thinned(torch.cat(steps))
        rank = max(1, round(target * len(distances)))
        # On a GPU kthvalue has no deterministic form. On a CPU it is several times faster than a sort.
        chosen = distances.sort().values[rank - 1] if distances.is_cuda else distances.kthvalue(rank).values
        widths.append(chosen)
    return torch.stack(widths).float()


def thinned(values: Tensor) -> Tensor:
    """At most CALIBRATION_SAMPLES of the values, evenly: all layers' potentials do not fit beside a large network."""
    return values.flatten()[:: -(-values.numel() // CALIBRATION_SAMPLES)]
