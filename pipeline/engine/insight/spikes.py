"""The spikes of one validation sample, and the membrane potentials of three layers, from one small forward pass.

The pass is one in evaluation mode without gradients. It draws no random number, loads no sample, and changes no state
of the run: it repeats a part of the evaluation before it. `Spikes.document` is RUN/spikes.json, which the report draws.
"""

import math
from collections import Counter

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config.sections import SURROGATES
from pipeline.engine.insight.samples import Samples
from pipeline.snn import surrogate
from pipeline.snn.membrane_probe import probed
from pipeline.snn.neurons import NeuronState

ROWS, FEWEST, MOST = 200, 12, 32
"""Neurons whose spikes are kept: about so many of all layers, and the fewest and most of one layer."""
STEPS, CELLS = 64, 12_000
"""Most time steps of these, and most neurons times steps: a deep network's raster has fewer steps."""
BINS, POTENTIALS = 64, 1 << 16
"""Of a histogram: its bins, and about the most potentials of one step that it counts."""
GOLDEN = (math.sqrt(5) - 1) / 2


class Spikes:
    """The samples of one evaluation, and a closer look at the first ones. Every rank has one and calls it alike.

    Args:
        neurons: the network's spiking layers, with their present widths.
        T: time steps for which an image is shown.
        keeps: whether this rank makes the document; the others take part in the pass alone.
    """

    def __init__(self, neurons: NeuronState, *, T: int, keeps: bool) -> None:
        self._neurons, self._T, self._keeps = neurons, T, keeps
        self.samples = Samples()
        self._layers: list[_Layer] = []

    @torch.no_grad()
    def look(self, network: nn.Module) -> None:
        """Runs the network, or its engine, over the first images of the evaluation. A collective."""
        self.samples.gather()
        images, training = self.samples.images, network.training
        if images is None:
            return
        images = images.to(next(network.parameters()).dtype)
        neurons = self._neurons.neurons
        most = min(MOST, max(FEWEST, ROWS // len(neurons)))
        slot = self.samples.chosen[0] if self.samples.chosen else 0
        steps = min(STEPS, max(1, CELLS // (most * len(neurons))))
        T = len(images) if images.dim() == 5 else self._T  # event frames
        self._layers = [_Layer(T, images.shape[-4], slot, most, steps) for _ in neurons]

        def see(layer: int, u: Tensor) -> None:
            self._layers[layer].see_spikes(u)
            if layer in three(len(neurons)):
                self._layers[layer].see_potentials(u, self._neurons.widths[layer])

        network.eval()
        with probed(neurons if self._keeps else (), see):
            network(images)
        network.train(training)

    def document(self, *, step: int, weights: str, split: str, classes: tuple[str, ...]) -> dict:
        """What was seen, for JSON.

        Args:
            step: optimizer steps that the network has been trained for.
            weights: which of its weights it had, last or ema.
            split: of the samples.
            classes: names to show, by label.
        """
        ran = Counter(len(layer.fired) for layer in self._layers if layer.fired)
        T = max(ran, key=lambda steps: (ran[steps], steps), default=0)  # as most layers: one may run more often
        samples, state = self.samples, self._neurons
        return {
            "step": step,
            "weights": weights,
            "split": split,
            "num_steps": T,
            "num_images": 0 if samples.images is None else samples.images.shape[-4],
            "sample": samples.chosen and samples.chosen[1].document(classes),
            "layers": [layer.raster(T) for layer in self._layers],
            "potentials": [
                {
                    "layer": index,
                    **layer.rates(),
                    **histogram(
                        torch.cat(layer.potentials).float().cpu().numpy(),
                        shape=neuron.rule.shape,
                        scale=neuron.rule.scale,
                        width=width,
                        amplitude=amplitude,
                    ),
                }
                for index, (layer, neuron, width, amplitude) in enumerate(
                    zip(self._layers, state.neurons, state.widths.tolist(), state.amplitudes.tolist(), strict=False)
                )
                if layer.potentials
            ],
            "right": [sample.document(classes) for sample in samples.right],
            "wrong": [sample.document(classes) for sample in samples.wrong],
        }


def three(count: int) -> set[int]:
    """The first, the middle and the last of so many layers."""
    return {0, count // 2, count - 1}


def neurons_shown(size: int, most: int) -> list[int]:
    """At most so many of `size` neurons, in order: those at the fractions of k times the golden ratio.

    They spread over channels and places alike. With a constant stride they could all lie at one place of the image.
    """
    return list(range(size)) if size <= most else sorted({int(k * GOLDEN % 1 * size) for k in range(1, most + 1)})


class _Layer:
    """What one layer does in the pass.

    Args:
        T, num_images: time steps of the pass, and N.
        slot: the image whose spikes are kept.
        most, steps: how many neurons' spikes are kept, and of how many time steps.
    """

    def __init__(self, T: int, num_images: int, slot: int, most: int, steps: int) -> None:
        self._T, self._num_images, self._slot, self._most, self._steps = T, num_images, slot, most, steps
        self._size = 0
        self._shown: Tensor | None = None
        self._rows: list[Tensor] = []
        self.fired: list[Tensor] = []
        """Spikes of the image at each step, of all its neurons; 0-d."""
        self.potentials: list[Tensor] = []
        """h - v_th of all images, thinned, flat."""
        self._sums: list[Tensor] = []

    def see_spikes(self, u: Tensor) -> None:
        """Takes in u = h - v_th of one step `(N, …)`, or of several `(T, N, …)`, `(T N, …)` or `(T, N …)`.

        The last is SpikingJelly's PSN.
        """
        T, N = self._T, self._num_images
        if u.shape[:2] == (T, N):
            pass
        elif u.dim() == 2 and u.shape[0] == T and u.shape[1] % N == 0:
            if T == N:
                return  # either (N, …) or (T, N …)
            u = u.unflatten(1, (N, -1))
        elif u.shape[0] == N:
            u = u[None]
        elif u.dim() > 1 and u.shape[1] == N:
            pass
        elif u.shape[0] % N == 0:
            u = u.unflatten(0, (-1, N))
        else:
            return  # the images are not in its first dimensions: its raster stays empty
        for step in (u[:, self._slot] >= 0).flatten(1):
            if self._shown is None:
                self._size = len(step)
                self._shown = torch.tensor(neurons_shown(self._size, self._most), device=u.device)
            self.fired.append(step.sum())
            self._rows.append(step[self._shown])

    def see_potentials(self, u: Tensor, width: Tensor) -> None:
        """Takes in u of one step or several, of all images."""
        flat = u.flatten()
        self._sums.append(torch.stack([(flat >= 0).sum(), (flat.abs() < width).sum()]).double() / len(flat))
        self.potentials.append(flat[:: -(-len(flat) // POTENTIALS) | 1])  # odd, so not at the same column of each row

    def rates(self) -> dict[str, float]:
        """Share of the neuron-steps that fired, and share within the width of the threshold."""
        rate, covered = torch.stack(self._sums).mean(0).tolist()
        return {"firing_rate_ratio": rate, "coverage_ratio": covered}

    def raster(self, T: int) -> dict:
        """Neurons, spikes by step, and the rows of those that are shown, a digit for each step.

        The rows are empty where the layer did not run once for each of the T steps.
        """
        if self._shown is None or len(self.fired) != T:
            return {"num_neurons": self._size, "spikes": [], "shown": [], "rows": []}
        return {
            "num_neurons": self._size,
            "spikes": torch.stack(self.fired).tolist(),
            "shown": self._shown.tolist(),
            "rows": ["".join("01"[s] for s in row) for row in torch.stack(self._rows[: self._steps], 1).int().tolist()],
        }


def histogram(u: np.ndarray, *, shape: str, scale: str, width: float, amplitude: float) -> dict:
    """Counts of u = h - v_th between its 0.5 % and 99.5 % quantiles, wider where the surrogate is, and the surrogate.

    Args:
        u: flat, at least one finite value.
        shape, scale: of the surrogate, see snn/surrogate.py.
        width, amplitude: w and a of the layer.
    """
    u = u[np.isfinite(u)]
    low, high = np.quantile(u, [0.005, 0.995]) if len(u) else (0.0, 0.0)
    low, high = min(low, -1.15 * width), max(high, 1.15 * width)
    counts, _ = np.histogram(u, bins=BINS, range=(low, high))
    corners = width * np.array([-1 - 1e-4, -1 + 1e-4, -0.5, 0, 0.5, 1 - 1e-4, 1 + 1e-4])
    points = np.sort(np.concatenate([np.linspace(low, high, BINS + 1), corners]))
    values = surrogate.derivative(
        torch.from_numpy(points),
        torch.tensor(width, dtype=torch.float64),
        torch.tensor(amplitude, dtype=torch.float64),
        shape=shape,
        scale=scale,
    )
    return {
        "low": float(low),
        "high": float(high),
        "counts": counts.tolist(),
        "below": int((u < low).sum()),
        "above": int((u > high).sum()),
        "width": width,
        "surrogate": shape,
        "bounded": SURROGATES[shape],
        "curve": [[round(float(x), 6), float(f"{g:.6g}")] for x, g in zip(points, values.tolist(), strict=True)],
    }
