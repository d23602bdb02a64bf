"""Synaptic operations, firing rates and the 45 nm energy estimate of a network, as papers report them.

A convolution or linear layer whose input is spikes does an accumulation (AC) for each spike and connection. If its
input is analog (the images; the currents of MS-ResNet's shortcuts), it does a multiply-accumulate (MAC) for each
connection:

    MAC = connections                     once for what stays the same, as static images; else T times
    AC  = sum over t of the mean over the batch of (spikes x connections of that spike)
    E   = 4.6 pJ MAC + 0.9 pJ AC

A sum of n spikes (ADD) counts as n spikes: the hardware would receive them one by one. A spike's connections are
counted exactly, without those that padding and stride cut off. Energies of one 32-bit operation in 45 nm CMOS
are from Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from pipeline.snn.external_neurons import Surrogate
from pipeline.snn.membrane_probe import probed
from pipeline.snn.neurons import Neuron

PJ_PER_MAC = 4.6
PJ_PER_AC = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerEnergy:
    """One layer's operations for one sample, over all T steps."""

    name: str
    """Dotted name of the convolution or linear layer."""
    macs: float
    """Multiply-accumulates."""
    acs: float
    """Accumulations."""
    input_rate: float | None
    """Mean of the layer's input spikes over samples, steps and positions; None for analog input."""

    @property
    def picojoule(self) -> float:
        """E, in pJ."""
        return PJ_PER_MAC * self.macs + PJ_PER_AC * self.acs


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """A network's operations for one sample."""

    layers: tuple[LayerEnergy, ...]
    firing_rates: dict[str, float]
    """Mean of s of each neuron layer."""

    @property
    def microjoule(self) -> float:
        """Energy of the whole network for one sample, in µJ."""
        return sum(layer.picojoule for layer in self.layers) * 1e-6


def _connections(module: nn.Conv2d | nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """For each input element, the number of outputs it feeds; shaped to be multiplied with x."""
    if isinstance(module, nn.Linear):
        return torch.tensor(float(module.out_features), device=x.device)
    left, right, top, bottom = module._reversed_padding_repeated_twice  # also of padding="same"
    height, width = x.shape[-2] + top + bottom, x.shape[-1] + left + right
    ones = torch.ones(1, 1, height, width, device=x.device)
    kernel = torch.ones(1, 1, *module.kernel_size, device=x.device)
    stride, dilation = module.stride, module.dilation
    reached = torch.ones_like(functional.conv2d(ones, kernel, None, stride, 0, dilation))
    # The transposed convolution of ones counts, for each input position, the windows that cover it.
    covering = functional.conv_transpose2d(reached, kernel, None, stride, 0, 0, 1, dilation)  # pyright: ignore
    missing = (0, width - covering.shape[-1], 0, height - covering.shape[-2])  # what no window reaches
    covering = functional.pad(covering, missing)[..., top : top + x.shape[-2], left : left + x.shape[-1]]
    return covering * (module.out_channels // module.groups)


def _sum(earlier: LayerEnergy, now: LayerEnergy, calls: int) -> LayerEnergy:
    """A layer's operations after one more call, its `calls`-th."""
    rates = (earlier.input_rate, now.input_rate)
    mean = None if rates[0] is None or rates[1] is None else (rates[0] * (calls - 1) + rates[1]) / calls
    return LayerEnergy(name=now.name, macs=earlier.macs + now.macs, acs=earlier.acs + now.acs, input_rate=mean)


def average(parts: Sequence[tuple[Energy, int]]) -> Energy:
    """The mean over all samples, from the mean and number of samples of each part; needs at least one part."""
    total = sum(count for _, count in parts)

    def mean(of: Callable[[Energy], float]) -> float:
        return sum(of(part) * count for part, count in parts) / total

    first = parts[0][0]
    layers = tuple(
        LayerEnergy(
            name=layer.name,
            macs=mean(lambda part, i=i: part.layers[i].macs),
            acs=mean(lambda part, i=i: part.layers[i].acs),
            input_rate=None if layer.input_rate is None else mean(lambda part, i=i: part.layers[i].input_rate or 0.0),
        )
        for i, layer in enumerate(first.layers)
    )
    rates = {name: mean(lambda part, name=name: part.firing_rates[name]) for name in first.firing_rates}
    return Energy(layers=layers, firing_rates=rates)


@torch.no_grad()
def measure(network: nn.Module, images: torch.Tensor) -> Energy:
    """Count the operations of one evaluation forward pass.

    A layer's input counts as spikes if all its values are integers >= 0 and a neuron layer ran before it. The mean over
    positions before a linear layer counts as the spikes that it averages. A layer that is called several times, as once
    in each time step, counts every time. Products of activations, as in attention, are not counted.

    Args:
        network: a network of this package; its training flag is restored afterwards.
        images: (N, C, H, W), or (T, N, C, H, W) for event frames.

    Returns:
        Operations for one sample: means over the N of the batch.
    """
    N = images.shape[-4]
    found: dict[str, LayerEnergy] = {}
    rates: dict[str, float] = {}
    calls: dict[str, int] = {}
    undecided: set[str] = set()
    """Layers that got nothing but zeros, before any spike."""
    seen: dict[str, list[float]] = {}
    averaged: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
    """Means over positions, by their place in memory: what went in, and what came out."""

    def on_layer(name: str):
        def hook(module, inputs):
            before, _ = averaged.get(inputs[0].untyped_storage().data_ptr(), (inputs[0], None))
            x = before.double()
            with torch.autocast(x.device.type, enabled=False):  # bf16 would round counts above 256
                connections = _connections(module, x.float()).double()
            silent = not rates and not x.any()  # such as the recurrent input of a first layer, before its first spike
            analog = name in found and name not in undecided and found[name].input_rate is None  # also counts of events
            is_spikes = not analog and bool(rates) and bool((x >= 0).all()) and torch.equal(x, x.round())
            operations = (x * connections if is_spikes else torch.ones_like(x) * connections).sum().item() / N
            rate = x.mean().item() if is_spikes else None
            macs, acs = (0.0, operations) if is_spikes else (operations, 0.0)
            now = LayerEnergy(name=name, macs=macs, acs=acs, input_rate=rate)
            if is_spikes and name in undecided:
                found[name] = replace(found[name], macs=0.0, input_rate=0.0)
            if silent and (name in undecided or name not in found):
                undecided.add(name)
            else:
                undecided.discard(name)
            calls[name] = calls.get(name, 0) + 1
            found[name] = _sum(found[name], now, calls[name]) if name in found else now

        return hook

    def fired(name: str, rate: float) -> None:
        """Neurons may be called once a time step, or once for all."""
        seen.setdefault(name, []).append(rate)
        rates[name] = sum(seen[name]) / len(seen[name])

    def on_mean(_, inputs, out):
        averaged[out.untyped_storage().data_ptr()] = inputs[0], out

    handles, watched, surrogates = [], [], {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            handles.append(module.register_forward_pre_hook(on_layer(name)))
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            handles.append(module.register_forward_hook(on_mean))
        elif isinstance(module, Neuron):
            module.watch = partial(fired, name)
            watched.append(module)
        elif isinstance(module, Surrogate):
            surrogates[name] = module
    training = network.training
    network.eval()
    try:
        names = list(surrogates)
        with probed([*surrogates.values()], lambda layer, u: fired(names[layer], (u >= 0).float().mean().item())):
            network(images)
    finally:
        network.train(training)
        for handle in handles:
            handle.remove()
        for neuron in watched:
            neuron.watch = None
    return Energy(layers=tuple(found.values()), firing_rates=rates)
