"""Small networks of every kind of neurons that `chi.attach` measures, and a plain count beside its own."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline import chi
from pipeline.snn.kernels.reference import Rule
from pipeline.snn.neurons import Neuron
from tests.support import peers

T, WIDTH = 3, 0.7
KINDS = ("ours", "hand-written", "spikingjelly m", "spikingjelly s", "snntorch")


class HandWritten(nn.Module):
    """Integrate and fire with a hard reset, one step a call."""

    def __init__(self) -> None:
        super().__init__()
        self.spike, self.v = chi.Surrogate(width=WIDTH), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        h = self.v + x
        s = self.spike(h - 1)
        self.v = h * (1 - s.detach())
        return s


class Net(nn.Module):
    """Three linear layers, with neurons after the first two; (N, 32) → (N, 5), mean over T steps.

    The neurons are registered after all linear layers, as many people write it.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.norm, self.b, self.c = nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 5)
        self.first, self.second = (neurons(kind) for _ in range(2))
        if kind.startswith("spikingjelly"):
            peers.spikingjelly().functional.set_step_mode(self, kind[-1])

    def forward(self, x: Tensor) -> Tensor:
        states = self.begin()
        if self.kind in ("ours", "spikingjelly m"):
            current = self.norm(self.a(x)).expand(T, *x.shape[:-1], 32)
            return self.c(self.second(self.b(self.first(current)))).mean(0)
        out = []
        for _ in range(T):
            s, states[0] = self.step(self.first, self.norm(self.a(x)), states[0])
            s, states[1] = self.step(self.second, self.b(s), states[1])
            out.append(self.c(s))
        return torch.stack(out).mean(0)

    def begin(self) -> list:
        """Forgets the potentials; they are kept here, or by the neurons themselves."""
        if self.kind.startswith("spikingjelly"):
            peers.spikingjelly().functional.reset_net(self)
        if self.kind == "hand-written":
            self.first.v = self.second.v = torch.zeros(())  # pyright: ignore
        return [torch.zeros(()), torch.zeros(())]

    def step(self, neurons: nn.Module, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return neurons(x, state) if self.kind == "snntorch" else (neurons(x), state)


def neurons(kind: str) -> nn.Module:
    if kind == "ours":
        return Neuron(Rule(shape="triangle"), width=WIDTH)
    if kind == "hand-written":
        return HandWritten()
    if kind == "snntorch":
        return peers.snntorch().Leaky(beta=0.9, spike_grad=chi.Surrogate(width=WIDTH), init_hidden=False)
    return peers.spikingjelly().neuron.IFNode(surrogate_function=chi.Surrogate(width=WIDTH), detach_reset=True)


class PlainCount:
    """Counts beside `chi.attach`: each spike output that gets a gradient, with the distances it came from."""

    def __init__(self, net: nn.Module) -> None:
        self.layers: list[nn.Module] = [m for m in net.modules() if isinstance(m, (chi.Surrogate, Neuron))]
        self.counts = torch.zeros(len(self.layers), 3, dtype=torch.int64)
        for row, layer in enumerate(self.layers):
            layer.register_forward_hook(self._after(row))

    def _after(self, row: int) -> Callable:
        def after(module: nn.Module, inputs: tuple, spikes: Tensor) -> None:
            x = inputs[0].detach().float()  # in bf16 the width itself would be rounded
            u = x if isinstance(module, chi.Surrogate) else distances(x)
            count = torch.tensor([u.numel(), int((u >= 0).sum()), int((u.abs() < WIDTH).sum())])
            done: list[bool] = []

            def counted(_: Tensor) -> None:
                if not done:  # a spike that is used twice gets its gradient once
                    done.append(True)
                    self.counts[row] += count

            if spikes.requires_grad:
                spikes.register_hook(counted)

        return after

    def take(self) -> tuple[list[int], list[int], list[int]]:
        """Neuron-steps, spikes and covered neuron-steps by layer since the last call."""
        counts, self.counts = self.counts, torch.zeros_like(self.counts)
        return tuple(counts.T.tolist())  # pyright: ignore


def distances(x: Tensor) -> Tensor:
    """h - 1 of integrate-and-fire neurons with a hard reset, (T, ...)."""
    v, out = torch.zeros_like(x[0]), []
    for x_t in x:
        h = v + x_t
        out.append(h - 1)
        v = h * (h < 1)
    return torch.stack(out)
