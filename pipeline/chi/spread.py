"""How far potentials spread around the threshold: what the rival policies set the width from."""

import torch
from torch import Tensor

from pipeline.chi.indicator import Indicators
from pipeline.chi.policies import Evidence
from pipeline.config import ChiConfig
from pipeline.errors import ConfigError
from pipeline.snn.neurons import NeuronState
from pipeline.snn.sew_resnet import SpikingLayer


class Spread:
    """Measures what `chi.policy` asks for, and nothing for the policies that ask for nothing.

    mpd_agl reads the batch normalisations. ds_atgo looks at the potentials of the step before each decision, by a
    second pass over every layer's current (snn/potential.py), in the forward pass of each rank.
    """

    def __init__(self, config: ChiConfig, layers: list[SpikingLayer], neurons: NeuronState) -> None:
        self._config, self._layers, self._neurons = config, layers, neurons
        self._squares = torch.zeros(len(layers), dtype=torch.float64, device=neurons.widths.device)
        self._seen = [0] * len(layers)
        if config.policy == "mpd_agl":
            for layer in layers:
                if layer.norm is None:
                    raise ConfigError(f"chi.policy='mpd_agl' needs a batch normalisation before {layer.name}; use "
                                      "another policy")  # fmt: skip
        self.prepare(0)

    def prepare(self, count: int) -> None:
        """After a step, `count` of which were summed since the last decision: look at the next one if it decides."""
        if self._config.policy != "ds_atgo":
            return
        self._squares.zero_()
        self._seen = [0] * len(self._layers)
        looks = count + 1 >= self._config.interval
        for layer, neuron in enumerate(self._neurons.neurons):
            neuron.probe = self._see(layer) if looks else None

    def _see(self, layer: int):
        def see(u: Tensor) -> None:
            self._squares[layer] += u.square().mean(dtype=torch.float64)
            self._seen[layer] += 1

        return see

    def local(self) -> Tensor | None:
        """This rank's mean of (h - v_th)², `(L,)` float64, zeros where it did not look; None but for ds_atgo."""
        if self._config.policy != "ds_atgo":
            return None
        return self._squares / torch.tensor(self._seen, device=self._squares.device).clamp_min(1)

    @torch.no_grad()
    def evidence(self, indicators: Indicators, squares: Tensor | None = None) -> Evidence:
        """What the controller decides on, from a step's indicators and the mean over ranks of `local()`."""
        spread = None if squares is None else squares.sqrt()
        if self._config.policy == "mpd_agl":
            spread = torch.stack([self._from_norm(layer) for layer in self._layers])
        return Evidence(
            indicator=getattr(indicators, self._config.indicator),
            coverage=indicators.coverage,
            firing_rate=indicators.firing_rate,
            spread=spread,
        )

    @staticmethod
    def _from_norm(layer: SpikingLayer) -> Tensor:
        assert layer.norm is not None
        rule = layer.neuron.rule
        leak = layer.neuron.leak(layer.weight)
        kept = 1.0 if leak is None else 1 - leak.double()
        return (1 + kept**2) ** 0.5 * layer.norm.weight.abs().mean().double() * rule.v_th
