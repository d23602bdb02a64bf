"""Spiking neurons as modules, and the device vectors that hold every layer's width and counters.

A module holds parameters and references to its layer's scalars; the arithmetic is in kernels/. Until `bind` is called,
a neuron uses the width of its configuration and counts nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.snn import membrane_probe, surrogate
from pipeline.snn.external_neurons import Steered, Surrogate
from pipeline.snn.kernels import dispatch, norm
from pipeline.snn.kernels.packing import Again
from pipeline.snn.kernels.reference import Rule, potential_dtype
from pipeline.snn.kernels.tally import COUNTED, Tally


class Neuron(Steered):
    """A layer of IF, LIF or PLIF neurons, T steps at once: `(T, ...)` currents to `(T, ...)` spikes.

    PLIF learns one time constant for the layer, `1/tau = sigmoid(w)` with w a parameter. Source: Fang et al.,
    "Incorporating Learnable Membrane Time Constant to Enhance Learning of Spiking Neural Networks", ICCV 2021.

    Args:
        rule: kind of neuron, reset and surrogate.
        width: w of the surrogate until `bind`, in units of the potential, above 0.
        tau: membrane time constant of leaky rules, in time steps, at least 1.
        learn_tau: learn the time constant, starting from `tau`, which must then be above 1.

    Raises:
        ConfigError: unknown surrogate; a tau that cannot be learned.
    """

    def __init__(self, rule: Rule, *, width: float = 1.0, tau: float = 2.0, learn_tau: bool = False) -> None:
        super().__init__(rule, width)
        if learn_tau and not (rule.leaky and tau > 1):
            raise ConfigError(f"model.tau={tau!r} is not allowed for model.neuron plif; use a number above 1")
        # The name is SpikingJelly's, so that its state dicts fit. Shape (1,): DeepSpeed cannot broadcast ().
        self.w = nn.Parameter(torch.tensor([-math.log(tau - 1)])) if learn_tau else None
        self.tau = tau
        self.watch: Callable[[float], None] | None = None
        """Called with the firing rate of each forward pass. It makes the host wait: use it for measurements only."""
        self.ranks: norm.Ranks | None = None
        """The ranks that normalise this layer's input as one batch in training; see kernels/norm.py."""
        self._leak: torch.Tensor | None = None

    def leak(self, x: torch.Tensor) -> torch.Tensor | None:
        """1/tau as a 0-d tensor beside x; None for IF."""
        if not self.rule.leaky:
            return None
        if self.w is not None:
            return self.w.to(potential_dtype(self.w)).sigmoid()[0]
        if self._leak is None or self._leak.device != x.device:
            self._leak = torch.full((), 1 / self.tau, dtype=torch.float64, device=x.device)  # nothing is copied
        return self._leak

    def forward(self, x: torch.Tensor, num_steps: int | None = None) -> torch.Tensor:
        """Spikes from currents, starting at v_reset.

        Args:
            x: (T, ...), or (1, ...) with `num_steps` = T for a current that does not change in time.
            num_steps: T, where x holds one step.

        Returns:
            Spikes, (T, ...), 0 or 1 in x's dtype and memory format.
        """
        return self.step(x, None, num_steps=num_steps, want_state=False)[0]

    def step(
        self, x: torch.Tensor, v: torch.Tensor | None, *, num_steps: int | None = None, want_state: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `forward`, from the potential v (...), or None for v_reset; it returns the last potential too.

        A sequence may be run in chunks, each from the potential that the chunk before it returned: the spikes are those
        of the whole sequence.
        """
        width, amplitude = self.scalars(x)
        if self.probe is not None:
            membrane_probe.look(self.probe, x, self.rule, num_steps=num_steps, leak=self.leak(x), v=v)
        spikes, state = dispatch.run(
            x,
            self.rule,
            width,
            amplitude,
            num_steps=num_steps,
            leak=self.leak(x),
            v=v,
            tally=self.begin(x),
            want_state=want_state,
        )
        if self.watch is not None:
            self.watch(spikes.float().mean().item())
        return spikes, state

    def after_norm(
        self,
        y: torch.Tensor,
        bn: nn.BatchNorm2d,
        num_steps: int,
        *,
        static: bool = False,
        shortcut: torch.Tensor | None = None,
        again: Again | None = None,
    ) -> torch.Tensor:
        """`forward(bn(y)) + shortcut` in one op; see kernels/norm.py.

        Args:
            y: a convolution's output, (T N, C, H, W); (N, C, H, W) where static.
            bn: the normalisation between it and these neurons.
            num_steps: T.
            static: y is the same at every step.
            shortcut: added to the spikes, (T N, C, H, W), or None.
            again: how to recompute y in the backward pass; y is then not kept.

        Returns:
            (T N, C, H, W) in y's dtype.
        """
        width, amplitude = self.scalars(y)
        if self.probe is not None:
            current = membrane_probe.normalised(y, bn)
            steps = current[None] if static else current.unflatten(0, (num_steps, -1))
            membrane_probe.look(self.probe, steps, self.rule, num_steps=num_steps, leak=self.leak(y))
        out = norm.run(
            y,
            bn,
            self.rule,
            width,
            amplitude,
            num_steps=num_steps,
            static=static,
            leak=self.leak(y),
            shortcut=shortcut,
            tally=self.begin(y, bn),
            again=again,
            ranks=self.ranks,
        )
        if self.watch is not None:
            self.watch((out if shortcut is None else out - shortcut).float().mean().item())
        return out

    def extra_repr(self) -> str:
        return f"{self.rule}, width={self.width}" + (f", tau={self.tau}" if self.rule.leaky else "")


def from_config(model: ModelConfig) -> Neuron:
    """The neuron that a configuration describes.

    Raises:
        ConfigError: unknown neuron, reset or surrogate.
    """
    if model.neuron not in ("if", "lif", "plif"):
        raise ConfigError(f"model.neuron={model.neuron!r} is not allowed; use one of if, lif, plif")
    rule = Rule(
        leaky=model.neuron != "if",
        hard=model.reset == "hard",
        detach=model.detach_reset,
        v_th=model.v_th,
        shape=model.surrogate,
        scale=model.scale,
    )
    return Neuron(rule, width=model.width, tau=model.tau, learn_tau=model.neuron == "plif")


@dataclass(frozen=True, slots=True, eq=False)
class NeuronState:
    """One element for each spiking layer, in forward order, on the model's device. Change the vectors in place only."""

    names: tuple[str, ...]
    """Dotted names of the layers."""
    neurons: tuple[Neuron | Surrogate, ...]
    widths: torch.Tensor
    """w of the surrogate, (L,) fp32, in units of the potential; a change takes effect in the next step."""
    amplitudes: torch.Tensor
    """a of the surrogate, (L,) fp32; 1 unless it is steered."""
    tallies: tuple[Tally, ...]
    """What the layers' backward passes counted since `zero_counts`."""
    rms_targets: torch.Tensor
    """E[g^2] that `hold_rms` keeps, (L,) fp64; NaN before its first call. Saved with the amplitudes."""
    has_rms: torch.Tensor
    """Layers whose surrogate has scale rms, (L,) bool."""

    def counts(self) -> torch.Tensor:
        """`(4, L)` float64, since `zero_counts`: neuron-steps, spikes, covered, sum of g^2; see kernels/tally.py."""
        return torch.stack([tally.counts for tally in self.tallies], 1)

    @property
    def neuron_steps(self) -> torch.Tensor:
        """Neuron-steps of backward passes, (L,) float64."""
        return self.counts()[COUNTED.index("neuron_steps")]

    @property
    def spikes(self) -> torch.Tensor:
        """Spikes in them, (L,) float64."""
        return self.counts()[COUNTED.index("spikes")]

    @property
    def covered(self) -> torch.Tensor:
        """Neuron-steps with |h - v_th| < w, (L,) float64; 0 where the support is unbounded."""
        return self.counts()[COUNTED.index("covered")]

    @property
    def grad_sq(self) -> torch.Tensor:
        """Sum of g(h - v_th)^2, (L,) float64."""
        return self.counts()[COUNTED.index("grad_sq")]

    def zero_counts(self) -> None:
        """Start counting from 0."""
        for tally in self.tallies:
            tally.zero()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint has to hold, on the CPU; without the widths, which the controller saves."""
        return {name: getattr(self, name).to("cpu", copy=True) for name in ("amplitudes", "rms_targets")}

    def load_state_dict(self, state: dict) -> None:
        """Go on from another's `state_dict()`; `state` may have other entries too."""
        for name in ("amplitudes", "rms_targets"):
            getattr(self, name).copy_(state[name])

    def hold_rms(self, grad_sq: torch.Tensor, neuron_steps: torch.Tensor) -> None:
        """Set the amplitudes so that E[g^2] stays what it was at the first call; layers with scale rms only.

        No value is read by the host.

        Args:
            grad_sq: sum of g(h - v_th)^2 with the present amplitudes, (L,) fp64; summed over ranks.
            neuron_steps: number of terms in the sum, (L,).
        """
        mean_sq = grad_sq / neuron_steps
        first = self.rms_targets.isnan() & (mean_sq > 0) & mean_sq.isfinite()
        self.rms_targets.copy_(torch.where(first, mean_sq, self.rms_targets))
        wanted = surrogate.rms_amplitudes(self.amplitudes, mean_sq, self.rms_targets)
        self.amplitudes.copy_(torch.where(self.has_rms, wanted, self.amplitudes))


def listed_layers(model: nn.Module) -> list | None:
    """What the model's method `spiking_layers()` lists, as our networks have it.

    None without one, or where a model of others has something else by this name.
    """
    if not callable(getattr(type(model), "spiking_layers", None)):
        return None
    listed = list(model.spiking_layers())  # pyright: ignore
    return listed if all(hasattr(layer, "neuron") and hasattr(layer, "weight") for layer in listed) else None


def bind(model: nn.Module) -> NeuronState:
    """Give every spiking layer of `model` its element of vectors on the model's device.

    Call it once, after the model is on its device. Widths start from the configuration. The vectors are plain
    tensors: they are not in the state dict, and `model.to()` does not move them. Bind again after moving the model.

    Args:
        model: any module with spiking layers; their order is that of `spiking_layers()` if it has this method.

    Raises:
        ValueError: the model has no spiking layer.
    """
    if (listed := listed_layers(model)) is not None:
        layers = [(layer.name, layer.neuron) for layer in listed]
    else:
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, (Neuron, Surrogate))]
    if not layers:
        raise ValueError(
            f"bind: {type(model).__name__} has no spiking layer; put neurons.Neuron or external_neurons.Surrogate in it"
        )
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    L = len(layers)
    state = NeuronState(
        names=tuple(name for name, _ in layers),
        neurons=tuple(neuron for _, neuron in layers),
        widths=torch.tensor([neuron.width for _, neuron in layers], dtype=torch.float32, device=device),
        amplitudes=torch.tensor([neuron.amplitude for _, neuron in layers], dtype=torch.float32, device=device),
        tallies=tuple(Tally(device) for _ in layers),
        rms_targets=torch.full((L,), float("nan"), dtype=torch.float64, device=device),
        has_rms=torch.tensor([neuron.rule.scale == "rms" for _, neuron in layers], device=device),
    )
    for index, neuron in enumerate(state.neurons):
        neuron.attach(state.widths[index], state.amplitudes[index], state.tallies[index])
    return state
