"""Our surrogate for neurons of other libraries, which compute u = h - v_th and call it to get the spike.

    neuron.IFNode(surrogate_function=Surrogate("triangle"))      # SpikingJelly 2.0, step_mode "s" or "m"

Width, amplitude and counters are a layer's scalars in device memory, as for `neurons.Neuron`; `neurons.bind` assigns
them.
"""

from collections.abc import Callable

import torch
from torch import nn

from pipeline.snn import surrogate
from pipeline.snn.kernels.reference import Rule, Tally, spike


class Surrogate(nn.Module):
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
        super().__init__()
        surrogate.check(shape, scale)
        self.rule, self.width = Rule(shape=shape, scale=scale), width
        self.neuron_steps = 0
        """Neuron-steps of the last training call."""
        self.counted = 0
        """Neuron-steps of training since `NeuronState.zero_counts`."""
        self.tally: Tally | None = None
        self.probe: Callable[[torch.Tensor], None] | None = None
        self._scalars: tuple[torch.Tensor, torch.Tensor] | None = None

    def attach(self, width: torch.Tensor, amplitude: torch.Tensor, tally: Tally) -> None:
        """Read the width and amplitude from, and count into, these 0-d tensors."""
        self._scalars, self.tally = (width, amplitude), tally

    def leak(self, _: torch.Tensor) -> None:
        """None: the neuron of the other library does the leak itself."""

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """Spikes, 0 or 1, of u's shape and dtype."""
        if self.probe is not None:
            self.probe(u.detach().float())
        counts = self.tally if self.training and torch.is_grad_enabled() else None
        if counts is not None:
            self.neuron_steps = u.numel()
            self.counted += u.numel()
        width, amplitude = self._scalars or (torch.tensor(self.width), torch.ones(()))
        spikes = spike(u, width.to(u), amplitude.to(u), self.rule, counts)
        if counts is not None:
            counts.spikes.add_(spikes.detach().sum(dtype=torch.float64).long())
        return spikes

    def extra_repr(self) -> str:
        return f"{self.rule.shape}, scale={self.rule.scale}, width={self.width}"
