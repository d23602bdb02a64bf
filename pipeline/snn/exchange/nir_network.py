"""A graph of NIR as a network of this project: it runs, counts and trains with our neurons.

`nir_graph.py` says how a step of ours follows from NIR's equations; here it is read backwards.
"""

import math
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from pipeline.errors import ConfigError, first_line, is_outage
from pipeline.snn.exchange.nir_graph import INSTALL
from pipeline.snn.kernels.reference import Rule
from pipeline.snn.networks.network import Network, SpikingLayer
from pipeline.snn.neurons import Neuron

if TYPE_CHECKING:
    import nir

NEAR = 1e-6
"""Relative difference up to which numbers of a graph are the same: they, or products of dt, are rounded to fp32."""


class NirNetwork(Network):
    """Images `(N, *shape)` or event frames `(T, N, *shape)` to what the graph puts out, `(T, N, *out)`.

    Each node is a module of the same name, with _ for each dot; outputs that meet at a node are added. All T steps of a
    layer are computed at once, so a graph with a cycle is refused. All weights have one dtype: fp64 if one of the
    graph's is in it, else fp32.
    """

    def __init__(self, graph: "nir.NIRGraph", *, T: int, dt: float, surrogate: Rule, width: float) -> None:
        super().__init__()
        import nir

        self.T = T
        named = {name: name.replace(".", "_") for name in graph.nodes}
        twice = sorted(name for name in named if list(named.values()).count(named[name]) > 1)
        if twice:
            raise ConfigError(f"nodes {twice[0]!r} and {twice[1]!r} of this graph have the same name; rename one")
        self.steps = nn.ModuleDict()
        self.gains: dict[str, float] = {}
        """By what a neuron's input is multiplied, where it is not 1."""
        ends: dict[type, list[str]] = {nir.Input: [], nir.Output: []}
        sources: dict[str, list[str]] = {name: [] for name in graph.nodes}
        for source, target in sorted(graph.edges):
            for end in (source, target):
                if end not in named:
                    raise ConfigError(f"this graph has an edge {source!r} to {target!r}, and no node {end!r}")
            if source in sources[target]:
                raise ConfigError(f"this graph has the edge {source!r} to {target!r} twice; leave one out")
            sources[target].append(source)
        try:
            self.order = [(name, tuple(sources[name])) for name in TopologicalSorter(sources).static_order()]
        except CycleError as error:
            raise ConfigError(
                f"this graph has a cycle through {error.args[1][0]!r}; only graphs without are read"
            ) from None
        weights = [
            _array(node.weight)
            for node in graph.nodes.values()
            if isinstance(node, (nir.Conv2d, nir.Affine, nir.Linear))
        ]
        dtype = torch.float64 if any(weight.dtype == np.float64 for weight in weights) else torch.float32
        for name, _ in self.order:
            node = graph.nodes[name]
            if type(node) in ends:
                ends[type(node)].append(name)
            elif isinstance(node, (nir.IF, nir.LIF)):
                self.steps[named[name]], gain = _neurons(name, node, dt, surrogate, width)
                if gain != 1:
                    self.gains[name] = gain
            else:
                self.steps[named[name]] = _module(name, node).to(dtype)
            if not sources[name] and not isinstance(node, nir.Input):
                raise ConfigError(f"node {name!r} of this graph has no input")
        for kind, found in ends.items():
            if len(found) != 1:
                raise ConfigError(f"this graph has {len(found)} nodes {kind.__name__}; it must have one")
        (self.input,), (self.output,) = ends.values()
        shape = graph.nodes[self.input].input_type["input"]
        if shape is None:
            raise ConfigError(f"node {self.input!r} of this graph, its input, has no shape; write it with one")
        self.input_shape = tuple(int(n) for n in shape)
        self.frames_only = graph.metadata.get("kind") == "events"
        self.in_channels = self.input_shape[0]
        self._named = named
        self._check_shapes(graph, dtype)

    def _check_shapes(self, graph: "nir.NIRGraph", dtype: torch.dtype) -> None:
        """Raises ConfigError for a node that cannot take what it gets. Shapes leave N out."""
        shapes = {self.input: self.input_shape}
        for name, sources in self.order:
            if name == self.input:
                continue
            shape = shapes[sources[0]]
            for source in sources[1:]:
                if shapes[source] != shape:
                    raise ConfigError(
                        f"node {name!r} of this graph adds {sources[0]!r} of shape {shape} and {source!r} of shape "
                        f"{shapes[source]}; both must have one shape"
                    )
            node, module = graph.nodes[name], self._module(name)
            if module is None:
                said = node.output_type.get("output") if node.output_type else None
                why = "" if said is None or tuple(map(int, said)) == shape else f"its shape is {tuple(map(int, said))}"
            elif isinstance(module, Neuron):
                wrong = {_array(getattr(node, field)).shape for field in _fields(node)} - {(), (1,), shape}
                why = f"it has parameters of shape {min(wrong)}" if wrong else ""
            else:
                dims = {nn.Linear: 1, nn.Conv2d: 3, nn.AvgPool2d: 3}.get(type(module), len(shape))
                why = "" if len(shape) == dims else f"it takes {dims} dimensions"
                try:
                    shape = tuple(module(torch.zeros(1, *shape, dtype=dtype)).shape[1:]) if not why else shape
                except (RuntimeError, IndexError) as error:
                    why = first_line(error)
            if why:
                raise ConfigError(
                    f"node {name!r} of this graph, a {type(node).__name__}, cannot take the shape {shape}, without N, "
                    f"that it gets: {why}; write the graph with shapes that fit"
                )
            shapes[name] = shape

    def spiking_layers(self) -> list[SpikingLayer]:
        """The neuron layers in forward order, each with the convolution or linear layer behind it: of a sum, the one
        that ends the longest path from the input. Without those that get spikes alone, such as a maximum of spikes."""
        layers: list[SpikingLayer] = []
        # Of each node: length of the longest path of weights and neurons to it, and the weight at its end.
        paths: dict[str, tuple[int, nn.Parameter | None]] = {self.input: (0, None)}
        for name, sources in self.order:
            if not sources:
                continue
            length, weight = max((paths[source] for source in sources), key=lambda path: path[0])
            module = self._module(name)
            if isinstance(module, Neuron):
                if weight is not None:
                    layers.append(SpikingLayer(name, module, weight))
                length, weight = length + 1, None
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                assert isinstance(module.weight, nn.Parameter)
                length, weight = length + 1, module.weight
            paths[name] = length, weight
        return layers

    def _module(self, node: str) -> nn.Module | None:
        """The module of a node; None for the input and the output."""
        return self.steps[self._named[node]] if node not in (self.input, self.output) else None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        dims = len(self.input_shape)
        allowed = (dims + 2,) if self.frames_only else (dims + 1, dims + 2)
        if images.dim() not in allowed or images.shape[-dims:] != self.input_shape:
            shape = ", ".join(map(str, self.input_shape))
            still = "" if self.frames_only else f"(N, {shape}), or "
            raise ValueError(
                f"images of shape {tuple(images.shape)} are not allowed; use {still}(T, N, {shape}) for event frames"
            )
        like = next(self.parameters(), None)
        if like is not None and images.dtype != like.dtype and not torch.is_autocast_enabled(images.device.type):
            wider = ", or network.float()" if like.dtype == torch.float64 else ""
            raise ValueError(
                f"images of dtype {images.dtype} are not allowed, the network's weights are {like.dtype}; use "
                f"images.to({like.dtype}){wider}"
            )
        static = images.dim() == dims + 1
        T = self.T if static else len(images)
        # (S, N, ...): S is 1 as long as a value is the same at every step, then T.
        values = {self.input: images[None] if static else images}
        for name, sources in self.order:
            if name == self.input:
                continue
            x = values[sources[0]]
            for source in sources[1:]:
                x = x + values[source]
            if name == self.output:
                return x.expand(T, *x.shape[1:])
            module = self.steps[self._named[name]]
            if isinstance(module, Neuron):
                x = x * self.gains[name] if name in self.gains else x
                values[name] = module(x, num_steps=T if len(x) == 1 else None)
            else:
                values[name] = module(x.flatten(0, 1)).unflatten(0, (len(x), -1))
        raise AssertionError("the output comes last")


def _module(name: str, node: "nir.NIRNode") -> nn.Module:
    """The node as a module for `(N, ...)`."""
    import nir

    def pair(value) -> tuple[int, int]:
        both = np.broadcast_to(_array(value), (2,))
        return int(both[0]), int(both[1])

    if isinstance(node, nir.Conv2d):
        if len(node.weight.shape) != 4:
            raise ConfigError(
                f"node {name!r} of this graph has a weight of shape {tuple(node.weight.shape)}; it must be (out, in, "
                "height, width)"
            )
        c_out, c_in, height, width = node.weight.shape
        padding = node.padding if isinstance(node.padding, str) else pair(node.padding)
        groups = int(node.groups)
        conv = nn.Conv2d(
            c_in * groups,
            c_out,
            (height, width),
            pair(node.stride),
            padding,
            pair(node.dilation),
            groups,
            node.bias is not None,
        )
        return _filled(conv, node.weight, node.bias)
    if isinstance(node, (nir.Affine, nir.Linear)):
        bias = node.bias if isinstance(node, nir.Affine) else None
        if node.weight.ndim != 2:
            raise ConfigError(
                f"node {name!r} of this graph has a weight of shape {tuple(node.weight.shape)}; it must be (out, in)"
            )
        return _filled(nn.Linear(node.weight.shape[1], node.weight.shape[0], bias is not None), node.weight, bias)
    if isinstance(node, nir.AvgPool2d):
        return nn.AvgPool2d(pair(node.kernel_size), pair(node.stride), pair(node.padding))
    if isinstance(node, nir.SumPool2d):
        return nn.AvgPool2d(pair(node.kernel_size), pair(node.stride), pair(node.padding), divisor_override=1)
    if isinstance(node, nir.Flatten):
        start, end = int(node.start_dim), int(node.end_dim)
        return nn.Flatten(start + 1 if start >= 0 else start, end + 1 if end >= 0 else end)  # NIR leaves N out
    known = "Input, Output, Conv2d, Affine, Linear, AvgPool2d, SumPool2d, Flatten, IF and LIF"
    raise ConfigError(f"node {name!r} of this graph is a {type(node).__name__}, which is not read; {known} are")


def _filled(module: nn.Conv2d | nn.Linear, weight: np.ndarray, bias: np.ndarray | None) -> nn.Module:
    """The module with these numbers, in fp64."""
    module.weight = nn.Parameter(torch.from_numpy(_array(weight).copy()).to(torch.float64))
    if bias is not None:
        module.bias = nn.Parameter(torch.from_numpy(_array(bias).copy()).to(torch.float64))
    return module


def _array(value: object) -> np.ndarray:
    """Other libraries put tensors or plain numbers into a graph where NIR says arrays."""
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _fields(node: "nir.NIRNode") -> tuple[str, ...]:
    import nir

    return "v_reset", "r", "v_threshold", *(("tau", "v_leak") if isinstance(node, nir.LIF) else ())


def _neurons(name: str, node: "nir.IF | nir.LIF", dt: float, surrogate: Rule, width: float) -> tuple[Neuron, float]:
    """Our neurons of the node, and by what their input is multiplied."""
    import nir

    def one(field: str) -> float:
        values = np.unique(_array(getattr(node, field)).astype(np.float64))
        if values.size == 0 or not same(values[0], values[-1], 0.0):
            span = f"{values.size} values" + (f", {values[0]:g} to {values[-1]:g}" if values.size else "")
            raise ConfigError(
                f"{field} of node {name!r} has {span}; only layers in which all neurons are alike, and finite, are read"
            )
        return float(values[0])

    def same(one: float, other: float, scale: float) -> bool:
        near = math.isclose(one, other, rel_tol=NEAR, abs_tol=NEAR * scale)
        return near and math.isfinite(one) and math.isfinite(other)

    v_reset, r = one("v_reset"), one("r")
    rule = replace(surrogate, leaky=isinstance(node, nir.LIF), hard=True, v_th=one("v_threshold"), v_reset=v_reset)
    if isinstance(node, nir.IF):
        gain, tau = r * dt, 1.0
    else:
        gain, tau = r, one("tau") / dt
        if not (tau >= 1 or same(tau, 1, 1)):
            raise ConfigError(
                f"tau of node {name!r} is {one('tau'):g} s, less than a step of dt={dt:g}; use a smaller dt"
            )
        if not same(one("v_leak"), v_reset, abs(rule.v_th)):
            raise ConfigError(
                f"node {name!r} leaks to v_leak={one('v_leak'):g} and is reset to v_reset={v_reset:g}; only neurons "
                "with one value for both are read"
            )
    return Neuron(rule, width=width, tau=max(tau, 1.0)), 1.0 if same(gain, 1, 1) else gain


def load(
    source: "nir.NIRGraph | str | Path",
    *,
    T: int | None = None,
    dt: float | None = None,
    surrogate: Rule | None = None,
    width: float = 1.0,
) -> NirNetwork:
    """The network of a graph or of a file that `nir.write` made, in evaluation mode.

    Its weights are those of the graph and can be trained; batch normalisation that was folded stays folded.

    Args:
        source: the graph or its file.
        T: time steps of an image; None: what the graph's metadata says.
        dt: seconds of a time step; None: what the metadata says. Graphs of other libraries do not say it.
        surrogate: shape and scale of the surrogate and whether the reset is detached; the rest is not read.
        width: w of the surrogate, in units of the potential.

    Raises:
        ConfigError: there is no such file, T or dt is not known, or the graph holds what these neurons cannot do.
    """
    try:
        import nir
    except ImportError:
        raise ConfigError(f"a graph of NIR needs the package nir; which is not installed; run: {INSTALL}") from None
    if isinstance(source, nir.NIRGraph):
        graph = source
    else:
        try:
            # Its own check of shapes knows neither groups nor parameters that are one number for a layer.
            graph = nir.read(source, type_check=False)
        except (OSError, KeyError, ValueError, AssertionError, TypeError, AttributeError) as error:
            if isinstance(error, OSError) and is_outage(error):
                raise
            raise ConfigError(f"{source} cannot be read as a graph of NIR ({first_line(error)})") from None
    T = T if T is not None else graph.metadata.get("T")
    if not isinstance(T, (int, np.integer)) or T < 1:
        raise ConfigError(f"T={T!r:.80} is not allowed; say how many time steps an image is shown: T=4")
    dt = dt if dt is not None else graph.metadata.get("dt")
    neurons = [name for name, node in graph.nodes.items() if isinstance(node, (nir.IF, nir.LIF))]
    if dt is None and neurons:
        raise ConfigError(
            f"dt is not given, and this graph does not say it: neurons, such as {neurons[0]!r}, depend on the seconds "
            "of a time step; use dt=1e-4 for graphs of SpikingJelly and snnTorch, dt=1 for IF of sinabs and norse; "
            "docs/export.md has others"
        )
    dt = 1.0 if dt is None else dt
    if not (isinstance(dt, (int, float, np.number)) and math.isfinite(dt) and dt > 0):
        raise ConfigError(f"dt={dt!r:.80} is not allowed; use seconds above 0")
    return NirNetwork(graph, T=int(T), dt=float(dt), surrogate=surrogate or Rule(), width=width).eval()
