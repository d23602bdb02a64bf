"""Statistics that some settings need beside the indicators: the spread of potentials around the threshold, for the
rival policies, and the mean square of the surrogate, which `model.scale=rms` keeps constant.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from pipeline.chi.async_read import Constants
from pipeline.chi.indicators import Indicators
from pipeline.chi.policies import Evidence
from pipeline.config import ChiConfig
from pipeline.errors import ConfigError
from pipeline.snn.external_neurons import Steered
from pipeline.snn.neurons import Neuron, NeuronState


class Layer(Protocol):
    """A spiking layer, and the batch normalisation before it."""

    @property
    def name(self) -> str: ...

    @property
    def neuron(self) -> Steered: ...

    @property
    def norm(self) -> nn.Module | None: ...


class PotentialStats:
    """Measures only what `chi.policy` and the surrogates' scale need; nothing where they need nothing.

    mpd_agl reads the batch normalisations. ds_atgo reads the potentials in the last step before each decision, by a
    second pass over every layer's current (snn/membrane_probe.py), in the training forward pass of each rank.
    """

    def __init__(self, config: ChiConfig, layers: Sequence[Layer], neurons: NeuronState) -> None:
        self._config, self._layers, self._neurons = config, layers, neurons
        self._squares = torch.zeros(len(layers), dtype=torch.float64, device=neurons.widths.device)
        self._seen, self._looked = [0] * len(layers), Constants(neurons.widths.device)
        self._looks = config.policy == "ds_atgo"
        self._rms = any(neuron.rule.scale == "rms" for neuron in neurons.neurons)
        self._mean: Tensor | None = None
        self._grad_sq: tuple[Tensor, Tensor] | None = None
        if config.policy == "mpd_agl":
            for layer in layers:
                if layer.norm is None or not isinstance(layer.neuron, Neuron):
                    missing = "a batch normalisation before" if layer.norm is None else "the threshold and leak of"
                    raise ConfigError(f"chi.policy='mpd_agl' needs {missing} {layer.name}; use another policy")
        self.prepare(0)

    def prepare(self, count: int) -> None:
        """Call it after a step. `count`: steps summed since the last decision. Probes the next step if it decides."""
        if not self._looks:
            return
        self._squares.zero_()
        self._seen = [0] * len(self._layers)
        looks = count + 1 >= self._config.interval
        for layer, neuron in enumerate(self._neurons.neurons):
            neuron.probe = self._see(layer) if looks else None

    def _see(self, layer: int):
        def see(u: Tensor) -> None:
            if not (self._neurons.neurons[layer].training and torch.is_grad_enabled()):
                return
            self._squares[layer] += u.square().mean(dtype=torch.float64)
            self._seen[layer] += 1

        return see

    def share(self, counts: Tensor) -> Tensor:
        """What this rank adds to the step's all-reduce, float32, each part only where a setting needs it.

        Means of (h - v_th)², `(L,)`, zeros where it did not probe; then sums of g², `(L,)`, from `counts`, which are
        `NeuronState.counts()`.
        """
        parts = [self._squares[:0]]
        if self._looks:
            parts.append(self._squares / self._looked([max(1, seen) for seen in self._seen]))
        if self._rms:
            parts.append(counts[3])
        return torch.cat(parts).float()

    def take(self, summed: Tensor, *, num_ranks: int, neuron_steps: Tensor) -> None:
        """The sum of `share()` over ranks, for the next `hold_amplitudes` and `evidence`.

        Args:
            summed: float64, as long as `share()`.
            num_ranks: number of ranks in the sum.
            neuron_steps: `(L,)`, of all ranks.
        """
        if self._looks:
            self._mean = summed[: len(self._layers)] / num_ranks
        if self._rms:
            self._grad_sq = (summed[-len(self._layers) :], neuron_steps)

    def hold_amplitudes(self) -> None:
        """Sets the amplitudes of scale rms from the last `take`."""
        if self._grad_sq is not None:
            self._neurons.hold_rms(*self._grad_sq)
            self._grad_sq = None

    @torch.no_grad()
    def evidence(self, indicators: Indicators) -> Evidence:
        """What the controller decides on: a step's indicators and the last `take`."""
        spread = None if self._mean is None else self._mean.sqrt()
        if self._config.policy == "mpd_agl":
            spread = torch.stack([self._from_norm(layer) for layer in self._layers])
        return Evidence(
            indicator=getattr(indicators, self._config.indicator),
            coverage=indicators.coverage,
            firing_rate=indicators.firing_rate,
            spread=spread,
        )

    @staticmethod
    def _from_norm(layer: Layer) -> Tensor:
        assert isinstance(layer.norm, nn.modules.batchnorm._NormBase)
        rule = layer.neuron.rule
        leak = layer.neuron.leak(layer.norm.weight)
        kept = 1.0 if leak is None else 1 - leak.double()
        return (1 + kept**2) ** 0.5 * layer.norm.weight.abs().mean().double() * rule.v_th
