"""What a layer that is steered has in common, and our surrogate for neurons of other libraries.

    neuron.IFNode(surrogate_function=Surrogate("triangle"))      # SpikingJelly 2.0, step_mode "s" or "m"

Such neurons compute u = h - v_th and call the surrogate to get the spike. Width, amplitude and counters are a layer's
scalars in device memory, as for `neurons.Neuron`; `neurons.bind` assigns them.
"""

import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.snn import surrogate
from pipeline.snn.kernels import dispatch, reference
from pipeline.snn.kernels.reference import Rule, potential_dtype
from pipeline.snn.kernels.tally import Tally

_FRAMES = 6
"""From a surrogate's forward to what called it: torch has two frames between, and hooks one more."""


class Steered(nn.Module):
    """A layer whose surrogate has a width and an amplitude of its own, and which counts its training backward passes.

    Args:
        rule: kind of neuron, reset and surrogate.
        width: w of the surrogate until `bind`, in units of the potential, above 0.

    Raises:
        ConfigError: unknown shape or scale.
    """

    amplitude = 1.0
    """a of the surrogate until `bind`; another where scale rms had set it before `release`."""

    def __init__(self, rule: Rule, width: float) -> None:
        super().__init__()
        surrogate.check(rule.shape, rule.scale)
        self.rule, self.width = rule, width
        self.tally: Tally | None = None
        self.probe: Callable[[torch.Tensor], None] | None = None
        """Called with h - v_th (...) of every step, computed beside the layer's own pass; see membrane_probe.py."""
        self.on_input: Callable[[torch.Tensor, nn.Module | None], None] | None = None
        """Called with the input of a training pass through which a gradient will flow, and the batch normalisation that
        the layer applies to it itself; not in a compiled model."""
        self.on_pass: Callable[[], None] | None = None
        """Called at the start of a pass in training mode while the tally holds counts; not in a compiled model."""
        self.traced = False
        """Whether a pass of this layer was compiled by torch.compile."""
        self._scalars: tuple[torch.Tensor, torch.Tensor] | None = None

    def attach(self, width: torch.Tensor, amplitude: torch.Tensor, tally: Tally) -> None:
        """Read the width and amplitude from, and count into, these; 0-d tensors on the layer's device."""
        self._scalars, self.tally = (width, amplitude), tally

    def release(self) -> None:
        """Keep the present width and amplitude as the layer's own, and count no longer."""
        self.width, self.amplitude = self._own()
        self._scalars, self.tally, self.probe, self.on_input, self.on_pass = None, None, None, None, None

    def __getstate__(self) -> dict:
        """A copy has the present width and amplitude as its own, and counts for nobody."""
        copied = dict.fromkeys(("tally", "probe", "on_input", "on_pass", "_scalars"))
        width, amplitude = self._own()
        return {**self.__dict__, **copied, "width": width, "amplitude": amplitude}

    def _own(self) -> tuple[float, float]:
        """The present width and amplitude; the host waits."""
        if self._scalars is None:
            return self.width, self.amplitude
        return self._scalars[0].item(), self._scalars[1].item()

    @property
    def counted(self) -> int:
        """Neuron-steps of training passes since the last optimizer step (`NeuronState.zero_counts`); the host waits."""
        return 0 if self.tally is None else int(self.tally.counts[0])

    def leak(self, x: torch.Tensor) -> torch.Tensor | None:
        """1/tau as a 0-d tensor beside x; None without a leak, or where it is not known."""
        return None

    def scalars(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Width and amplitude of the surrogate, 0-d.

        Raises:
            ConfigError: they are on another device than x.
        """
        if self._scalars is None:
            dtype = potential_dtype(x)
            width, amplitude = torch.tensor((self.width, self.amplitude), dtype=dtype, device=x.device)
            return width, amplitude
        if self._scalars[0].device != x.device:
            raise ConfigError(f"the model was moved: its widths are on {self._scalars[0].device} and its input is on "
                              f"{x.device}; move it first, then chi.attach (or bind) again")  # fmt: skip
        return self._scalars

    def begin(self, x: torch.Tensor, norm: nn.Module | None = None) -> Tally | None:
        """At the start of a pass with input x, before `norm`: the tally to count into, in training mode."""
        if torch.compiler.is_compiling():
            self.traced = True
        elif self.training:
            if self.on_pass is not None and self.tally is not None and self.tally.any:
                self.on_pass()
            if self.on_input is not None and torch.is_grad_enabled() and x.requires_grad:
                self.on_input(x, norm)
        return self.tally if self.training else None


def _is_reset() -> bool:
    """Whether snnTorch's neurons ask by how much to reset: for the potential of the step before, already seen there."""
    frame = None if torch.compiler.is_compiling() else sys._getframe(1)
    for _ in range(_FRAMES):
        if frame is None:
            return False
        if frame.f_code.co_name == "mem_reset":
            return True
        frame = frame.f_back
    return False


class Surrogate(Steered):
    """`1[u >= 0]` whose derivative is g_w(u): callable on u of any shape, once for each time step or for all at once.

    Args:
        shape, scale: of the surrogate, see surrogate.py.
        width: the first w, in units of the potential, above 0; `chi.attach` may change it later.

    Raises:
        ConfigError: unknown shape or scale.
    """

    spiking = True
    """SpikingJelly reads this attribute of a surrogate: the forward pass is a step function."""

    def __init__(self, shape: str = "triangle", scale: str = "area", width: float = 1.0) -> None:
        super().__init__(Rule(shape=shape, scale=scale), width)
        # To the kernels it is one time step of an IF layer with threshold 0: then h = u.
        self._step = replace(self.rule, v_th=0.0)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """Spikes, 0 or 1, of u's shape and dtype."""
        if self.probe is not None and not _is_reset():
            self.probe(u.detach().float())
        width, amplitude = self.scalars(u)
        tally = self.begin(u)
        if dispatch.choose(u, self._step) is None:
            dtype = potential_dtype(u)
            return reference.spike(u, width.to(dtype), amplitude.to(dtype), self._step, tally)
        return dispatch.run(u[None], self._step, width, amplitude, tally=tally)[0][0]

    def extra_repr(self) -> str:
        return f"{self.rule.shape}, scale={self.rule.scale}, width={self.width}"
