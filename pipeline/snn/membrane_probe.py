"""Reads membrane potentials while a network runs, by a second, plain pass over a layer's current.

The kernels never write h to memory. To get its distribution, set a neuron's `probe` during one or two forward passes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from pipeline.snn.kernels import reference


class Probed(Protocol):
    """A spiking layer (`Neuron` or `Surrogate`) that calls `probe` with u = h - v_th while `probe` is not None."""

    probe: Callable[[torch.Tensor], None] | None


class Layers(Protocol):
    """The part of `snn.neurons.NeuronState` that this file reads."""

    @property
    def neurons(self) -> Sequence[Probed]: ...

    @property
    def widths(self) -> torch.Tensor: ...


@contextmanager
def probed(neurons: Sequence[Probed], see: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """While the block runs, `see(layer, u)` gets u = h - v_th of every layer at every step, fp32 (fp64 for fp64).

    Probes that were there before get nothing meanwhile, and are there again afterwards.
    """

    def of(layer: int) -> Callable[[torch.Tensor], None]:
        return lambda u: see(layer, u)

    before = [neuron.probe for neuron in neurons]
    for layer, neuron in enumerate(neurons):
        neuron.probe = of(layer)
    try:
        yield
    finally:
        for neuron, probe in zip(neurons, before, strict=True):
            neuron.probe = probe


def look(
    see: Callable[[torch.Tensor], None],
    x: torch.Tensor,
    rule: reference.Rule,
    *,
    num_steps: int | None,
    leak: torch.Tensor | None,
    v: torch.Tensor | None = None,
) -> None:
    """Calls `see` with h - v_th of every step, in the caller's grad mode.

    Arguments as in `reference.run`; a static x holds one step.
    """
    x, leak, v = x.detach(), None if leak is None else leak.detach(), None if v is None else v.detach()
    if num_steps is not None and x.shape[0] == 1:
        x = x.expand(num_steps, *x.shape[1:])
    one = torch.ones((), device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        reference.run(x, rule, one, one, leak=leak, v=v, see=see)


@torch.no_grad()
def normalised(y: torch.Tensor, bn: nn.BatchNorm2d) -> torch.Tensor:
    """bn(y) in the potential's dtype; its running statistics stay as they are."""
    y = y.to(reference.potential_dtype(y))
    # In fp16 DeepSpeed casts all of these but y; None stays None.
    running = (None, None) if bn.training else (bn.running_mean, bn.running_var)
    mean, var, weight, bias = (x if x is None else x.to(y.dtype) for x in (*running, bn.weight, bn.bias))
    with torch.autocast(y.device.type, enabled=False):
        return functional.batch_norm(y, mean, var, weight, bias, training=bn.training, eps=bn.eps)


@torch.no_grad()
def by_time_step(network: nn.Module, images: torch.Tensor, layers: Layers) -> tuple[torch.Tensor, torch.Tensor]:
    """Coverage and firing rate `(L, T)` of one forward pass of `images`, at the present widths.

    Batch normalisation works as the network's mode says; in training mode its running statistics change.
    """
    coverage: list[list[torch.Tensor]] = [[] for _ in layers.neurons]
    rate: list[list[torch.Tensor]] = [[] for _ in layers.neurons]

    def see(layer: int, u: torch.Tensor) -> None:
        coverage[layer].append((u.abs() < layers.widths[layer]).double().mean())
        rate[layer].append((u >= 0).double().mean())

    with probed(layers.neurons, see):
        network(images)
    return tuple(torch.stack([torch.stack(steps) for steps in table]) for table in (coverage, rate))  # pyright: ignore
