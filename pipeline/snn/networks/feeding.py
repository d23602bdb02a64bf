"""Which weights feed a spiking layer, in any network.

The network's own list (`spiking_layers()`) where it has one. Else autograd's graph tells, in the first training passes:
the nearest convolution or linear layer behind the input of the neurons, without passing through another spiking layer;
of the terms of a sum, that with the most spiking layers behind it; of neurons that are used in several places, those of
all places.
Where there is no graph to look at (a compiled model, weights outside a checkpointed block, FSDP2), it is the one that
is registered last before the neurons.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pipeline.snn.external_neurons import Steered
from pipeline.snn.networks.input_graph import InputGraph
from pipeline.snn.neurons import NeuronState, listed_layers

_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
_WITHIN = ".parametrizations."
_OF_INPUT = ".input_weights"
"""norse's name of the weights before recurrent neurons, beside those of the spikes of the step before."""
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
    depths: dict[int, int] = {}
    for layer in layers:
        layer.neuron.on_input = _look(layer, network, neurons, depths)
    return layers


def _look(
    layer: FedLayer, network: nn.Module, neurons: NeuronState, depths: dict[int, int]
) -> Callable[[Tensor, nn.Module | None], None]:
    end = None
    """The input of the call before: the state of the neurons leads from a time step to all before it."""

    def look(x: Tensor, norm: nn.Module | None) -> None:
        nonlocal end
        meters = [id(tally.meter) for tally in neurons.tallies]
        meter = id(layer.neuron.tally and layer.neuron.tally.meter)
        own = depths.get(meter, math.inf)
        # Spikes of the layer itself, or of a later one, come from the step before.
        graph = InputGraph(x, {one: depth if (depth := depths.get(one, 0)) < own else 0 for one in meters}, end)
        depths.setdefault(meter, graph.depth[graph.root] + 1)
        found, before, known = nearest(graph, network, layer.name)
        layer.see(found, norm or before, known)
        end = graph.root

    return look


def nearest(graph: InputGraph, network: nn.Module, name: str) -> tuple[tuple[str, ...], nn.Module | None, bool]:
    """Names of the parameters of `network` that make the weight behind the input of the neurons `name`, the batch
    normalisation between the two, and whether the graph tells them.

    Convolutions and linear layers come before other parameters of two dimensions, and these before what belongs to the
    neurons themselves (recurrent weights). Of several, as of the terms of a sum, it is the one with the most spiking
    layers behind it, so no shortcut's; of these the nearest, but no gate's that is computed from another's output. None
    where only other layers' spikes are behind x. What gets a sum has no normalisation of its own. The graph does not
    tell where it ends nearer than a weight in a part that is compiled or a parameter that is none of the network's
    (FSDP2's gathered ones), or in a tensor alone, as a checkpoint's input.
    """
    names = {id(parameter): path for path, parameter in network.named_parameters()}
    modules = dict(network.named_modules())
    holder = name.rpartition(".")[0]
    recurrent = holder + "." if type(modules[holder]).__module__.split(".")[0] in LIBRARIES else name + "."
    reached, hidden, of_spikes = [], [], []
    for node, distance in graph.distance.items():
        leaf: Any = getattr(node, "variable", None)
        path = names.get(id(leaf))
        if path is None:
            compiled = node.name().startswith("CompiledFunction")
            if compiled or leaf is not None:
                of_spikes.append(graph.is_meter(node))
                hidden += [distance] * (compiled or isinstance(leaf, nn.Parameter))
            continue
        owner = owner_of(path)
        if leaf.dim() >= 2 and not isinstance(modules[owner], nn.modules.batchnorm._BatchNorm):
            is_of_input, product = path.endswith(_OF_INPUT), graph.product_of(node)
            is_recurrent = path.startswith(recurrent) and not is_of_input
            is_weighted = isinstance(modules[owner], _WEIGHTED) or is_of_input
            kind = (is_recurrent, not is_weighted, -graph.depth[product])
            reached.append((kind, product, distance, owner, path))
    if not reached:
        return (), None, bool(of_spikes) and all(of_spikes)
    best = min(kind for kind, *_ in reached)
    first = graph.first({product for kind, product, *_ in reached if kind == best})
    away, owner, path = min(rest for kind, product, *rest in reached if kind == best and product in first)
    if any(distance <= away for distance in hidden):
        return (), None, False
    parameters = _weight_of(network, owner) if isinstance(modules[owner], _WEIGHTED) else (path,)
    used = (names.get(id(leaf)) for node in graph.on_the_way() for leaf in graph.leaves_of(node))
    owners = (modules[owner_of(path)] for path in used if path is not None)
    return parameters, next((one for one in owners if isinstance(one, nn.modules.batchnorm._BatchNorm)), None), True


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
