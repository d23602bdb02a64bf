"""Which weights feed a spiking layer, in any network.

The network's own list (`spiking_layers()`) where it has one. Else autograd's graph tells, in the first training passes:
the nearest convolution or linear layer behind the input of the neurons, without passing through another spiking layer;
of neurons that are used in several places, those of all places.
Where there is no graph to look at (a compiled model, weights outside a checkpointed block, FSDP2), it is the one that
is registered last before the neurons.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from pipeline.snn.external_neurons import Steered
from pipeline.snn.neurons import NeuronState, listed_layers

_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
_WITHIN = ".parametrizations."
LIBRARIES = ("spikingjelly", "snntorch", "norse")
"""Libraries whose neurons hold a surrogate, and perhaps recurrent weights beside it."""


@dataclass(slots=True, eq=False)
class FedLayer:
    """A spiking layer and what feeds it."""

    name: str
    """Dotted name of the neurons' module."""
    neuron: Steered
    parameters: tuple[str, ...]
    """Names of the parameters that make its weight: one, or those of a parametrisation or of several places; empty
    where none is known."""
    known: bool
    """The network or the graph says so; else it is a guess from the order of registration."""
    norm: nn.Module | None
    """The batch normalisation between the two."""
    network: nn.Module

    @property
    def weight(self) -> nn.Parameter | None:
        """The weight, or the first of the parameters that make it; None where none is known."""
        return self.network.get_parameter(self.parameters[0]) if self.parameters else None

    def settle(self) -> None:
        """After a training step in which the neurons got a gradient: looks no longer, unless the weight is a guess that
        the graph could not show because it is frozen."""
        if self.known or not self._is_frozen():
            self.neuron.on_input = None

    def see(self, found: tuple[str, ...], norm: nn.Module | None, known: bool) -> None:
        """Takes in what `nearest` found behind one input."""
        if not known or (not found and self._is_frozen()):
            return
        if not self.known or not self.parameters:
            self.parameters, self.norm, self.known = found, norm, True
        else:
            self.parameters = tuple(dict.fromkeys((*self.parameters, *found)))

    def _is_frozen(self) -> bool:
        return self.weight is not None and not self.weight.requires_grad


def fed_layers(network: nn.Module, neurons: NeuronState) -> list[FedLayer]:
    """The spiking layers in forward order. Their `parameters` may change in training passes until `settle`."""
    owners = {id(module): name for name, module in network.named_modules()}
    if (listed := listed_layers(network)) is not None:
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        feeds = [() if layer.weight is None else (names[id(layer.weight)],) for layer in listed]
        return [
            FedLayer(layer.name, layer.neuron, feed, True, layer.norm, network)
            for layer, feed in zip(listed, feeds, strict=True)
        ]
    of_neuron = {id(neuron): name for name, neuron in zip(neurons.names, neurons.neurons, strict=True)}
    layers, parameters, norm = [], (), None
    for module in network.modules():
        if isinstance(module, _WEIGHTED):
            parameters, norm = _weight_of(network, owners[id(module)]), None
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            norm = module
        elif id(module) in of_neuron:
            assert isinstance(module, Steered)
            layers.append(FedLayer(of_neuron[id(module)], module, parameters, False, norm, network))
    for layer in layers:
        layer.neuron.on_input = _look(layer, network, neurons)
    return layers


def _look(layer: FedLayer, network: nn.Module, neurons: NeuronState) -> Callable[[Tensor, nn.Module | None], None]:
    def look(x: Tensor, norm: nn.Module | None) -> None:
        found, before, known = nearest(x, network, layer.name, neurons)
        layer.see(found, norm or before, known)

    return look


def nearest(
    x: Tensor, network: nn.Module, name: str, neurons: NeuronState
) -> tuple[tuple[str, ...], nn.Module | None, bool]:
    """Names of the parameters of `network` that make the weight nearest behind `x`, the input of the neurons `name`,
    the batch normalisation between the two, and whether the graph tells them.

    Convolutions and linear layers come before other parameters of two dimensions, and these before what belongs to the
    neurons themselves (recurrent weights). None where only other layers' spikes are behind x. The graph does not
    tell where it ends nearer than a weight in a part that is compiled or a parameter that is none of the network's
    (FSDP2's gathered ones), or in a tensor alone, as a checkpoint's input.
    """
    names = {id(parameter): path for path, parameter in network.named_parameters()}
    modules = dict(network.named_modules())
    holder = name.rpartition(".")[0]
    recurrent = holder + "." if type(modules[holder]).__module__.split(".")[0] in LIBRARIES else name + "."
    meters = {id(tally.meter) for tally in neurons.tallies}
    reached, norms, hidden, of_spikes, nearest_at = [], [], [], [], math.inf
    for distance, leaf in _behind(x, meters):
        if distance > nearest_at:
            break
        path = names.get(id(leaf))
        if leaf is None or path is None:
            of_spikes.append(id(leaf) in meters)
            hidden += [distance] * (leaf is None or isinstance(leaf, nn.Parameter))
            continue
        owner = owner_of(path)
        if isinstance(modules[owner], nn.modules.batchnorm._BatchNorm):
            norms.append((distance, owner))
        elif leaf.dim() >= 2:
            is_recurrent, is_weighted = path.startswith(recurrent), isinstance(modules[owner], _WEIGHTED)
            reached.append((is_recurrent, not is_weighted, distance, owner, path))
            if is_weighted and not is_recurrent:
                nearest_at = distance
    if not reached:
        return (), None, bool(of_spikes) and all(of_spikes)
    _, _, away, owner, path = min(reached)
    if any(distance <= away for distance in hidden):
        return (), None, False
    parameters = _weight_of(network, owner) if isinstance(modules[owner], _WEIGHTED) else (path,)
    between = min((one for one in norms if one[0] < away), default=None)
    return parameters, None if between is None else modules[between[1]], True


def _behind(x: Tensor, meters: set[int]) -> Iterator[tuple[int, Tensor | None]]:
    """The leaves of the graph behind x with their distance, nearest first, up to the spiking layers before it: of these
    the meter, of a part that is compiled None, since it hides what it does with its leaves."""
    level, seen, distance = [x.grad_fn], set(), 0
    while level:
        following = []
        for node in level:
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                yield distance, node.variable  # pyright: ignore
                continue
            inputs = [function for function, _ in node.next_functions]
            of_spikes = [one for one in inputs if id(getattr(one, "variable", None)) in meters]
            if node.name().startswith("CompiledFunction"):
                yield distance, None
            else:
                following += of_spikes or inputs
        level, distance = following, distance + 1


def owner_of(path: str) -> str:
    """Name of the module whose weight the parameter `path` is, or is a part of."""
    return path.split(_WITHIN)[0] if _WITHIN in path else path.rpartition(".")[0]


def _weight_of(network: nn.Module, owner: str) -> tuple[str, ...]:
    """Names of the parameters that make the weight of the module `owner`: `weight`, or what it is computed from."""
    prefix = owner + "." if owner else ""
    named = {id(parameter): path for path, parameter in network.named_parameters()}
    module = network.get_submodule(owner)
    if isinstance(module._parameters.get("weight"), nn.Parameter):
        return (named[id(module.weight)],)  # shared weights have the name of their first owner
    made = [path for path, _ in network.named_parameters() if path.startswith(prefix + _WITHIN[1:] + "weight.")]
    if not made:  # torch.nn.utils.weight_norm and spectral_norm, the older forms
        made = [prefix + part for part in ("weight_g", "weight_v", "weight_orig") if part in module._parameters]
    return tuple(made)
