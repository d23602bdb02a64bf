"""A trained network as a graph of NIR, the format that simulators and tools of neuromorphic chips share.

Source: Pedersen et al., "Neuromorphic intermediate representation: A unified instruction set for interoperable
brain-inspired computing", Nature Communications 2024; the equations are those of the package `nir`, 1.0.

NIR's neurons are equations in time and ours are steps. A step of forward Euler of length dt makes one of the other:

    NIR's IF      v' = r I                          v + dt r I                             ours: r = 1/dt
    NIR's LIF     tau' v' = (v_leak - v) + r I      v + dt/tau' ((v_leak - v) + r I)       ours: tau' = tau dt, r = 1,
                                                                                           v_leak = v_reset

A spike sets v to v_reset in both. Three things are left to the reader of a graph, and its metadata says ours: v starts
at v_reset; a neuron fires at v >= v_threshold, where NIR writes v > v_threshold; the logits are the mean of the output
over T steps, in each of which the image is the input, or of event data one frame after the other.

What a graph holds: batch normalisation is part of the convolution before it; where a block adds its shortcut, both
paths have an edge to every reader, since NIR adds what meets at an input; max-pooling of spikes is average pooling and
IF neurons that fire at any spike in the window; the mean over the image is average pooling of its whole side.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.snn.networks.ms_resnet import MSResNet
from pipeline.snn.networks.sew_resnet import SEWResNet
from pipeline.snn.neurons import Neuron

if TYPE_CHECKING:
    import nir

DT = 1e-4
"""Seconds of a time step, as in graphs of SpikingJelly and snnTorch."""
INSTALL = 'pip install -c constraints.txt -e ".[export]"'


class Signal(NamedTuple):
    """What flows between nodes: the sum of the outputs of `sources`, each of `shape` (C, H, W) or (K,)."""

    sources: tuple[str, ...]
    shape: tuple[int, ...]

    def __add__(self, other: "Signal") -> "Signal":  # pyright: ignore[reportIncompatibleMethodOverride]
        assert self.shape == other.shape
        return Signal(self.sources + other.sources, self.shape)


class Writer:
    """Nodes and edges of a graph that grows in forward order.

    Args:
        dt: seconds of a time step.
        dtype: of the weights in the graph; they are folded in fp64.
    """

    def __init__(self, dt: float, dtype: torch.dtype) -> None:
        self.dt, self.dtype = dt, torch.empty((), dtype=dtype).numpy().dtype
        self.nodes: dict[str, nir.NIRNode] = {}
        self.edges: list[tuple[str, str]] = []

    def add(self, name: str, node: "nir.NIRNode", inputs: Signal | None, shape: tuple[int, ...]) -> Signal:
        self.nodes[name] = node
        self.edges += [(source, name) for source in inputs.sources] if inputs else []
        return Signal((name,), shape)

    def array(self, tensor: torch.Tensor) -> np.ndarray:
        return tensor.detach().cpu().numpy().astype(self.dtype)

    def input(self, shape: tuple[int, ...]) -> Signal:
        import nir

        return self.add("input", nir.Input({"input": np.array(shape)}), None, shape)

    def output(self, x: Signal) -> None:
        import nir

        self.add("output", nir.Output({"output": np.array(x.shape)}), x, x.shape)

    def convolution(self, name: str, conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Signal) -> Signal:
        """The convolution and, folded into it, the normalisation by running statistics behind it."""
        import nir

        weight, bias = folded(conv, norm)
        padding = conv.padding if isinstance(conv.padding, str) else tuple(map(int, conv.padding))
        node = nir.Conv2d(
            input_shape=(x.shape[1], x.shape[2]),
            weight=self.array(weight),
            stride=(conv.stride[0], conv.stride[1]),
            padding=padding,  # pyright: ignore[reportArgumentType]
            dilation=(conv.dilation[0], conv.dilation[1]),
            groups=conv.groups,
            bias=self.array(bias),
        )
        return self.add(name, node, x, tuple(int(n) for n in node.output_type["output"]))

    def neurons(self, name: str, neuron: Neuron, x: Signal) -> Signal:
        """A layer of IF, LIF or PLIF neurons."""
        rule = neuron.rule
        if not rule.hard:
            raise ConfigError(
                f"NIR cannot say model.reset='soft' ({name}): a spike of its neurons sets the potential to v_reset; "
                "train with --model.reset hard"
            )
        leak = neuron.leak(torch.empty(0, dtype=torch.float64))
        return self._neurons(name, x, v_threshold=rule.v_th, v_reset=rule.v_reset, leak=leak)

    def _neurons(
        self, name: str, x: Signal, *, v_threshold: float, v_reset: float, leak: torch.Tensor | None
    ) -> Signal:
        import nir

        def each(value: float) -> np.ndarray:
            return np.full(x.shape, value)

        if leak is None:
            node = nir.IF(r=each(1 / self.dt), v_threshold=each(v_threshold), v_reset=each(v_reset))
        else:
            node = nir.LIF(
                tau=each(self.dt / leak.item()),
                r=each(1.0),
                v_leak=each(v_reset),
                v_threshold=each(v_threshold),
                v_reset=each(v_reset),
            )
        return self.add(name, node, x, x.shape)

    def max_pooling(self, name: str, pool: nn.Module, x: Signal) -> Signal:
        """Max-pooling of spikes 0 and 1; x itself if `pool` does nothing."""
        import nir

        if isinstance(pool, nn.Identity):
            return x
        assert isinstance(pool, nn.MaxPool2d)
        kernel, stride, padding = (np.array([n, n]) for n in (pool.kernel_size, pool.stride, pool.padding))
        side = [(n + 2 * int(padding[0]) - int(kernel[0])) // int(stride[0]) + 1 for n in x.shape[1:]]
        pooled = self.add(f"{name}.mean", nir.AvgPool2d(kernel, stride, padding), x, (x.shape[0], *side))
        # One spike in the window gives 1 / window or more; half of it is safe from rounding. Without one, v stays 0.
        return self._neurons(name, pooled, v_threshold=0.5 / math.prod(kernel), v_reset=0.0, leak=None)

    def mean_and_linear(self, pool: str, name: str, linear: nn.Linear, x: Signal) -> Signal:
        """The mean over the whole image, then the linear layer."""
        import nir

        side = np.array(x.shape[1:])
        mean = self.add(pool, nir.AvgPool2d(side, side, np.array([0, 0])), x, (x.shape[0], 1, 1))
        flat = self.add("flatten", nir.Flatten({"input": np.array(mean.shape)}, 0, -1), mean, (x.shape[0],))
        node = nir.Affine(self.array(linear.weight), self.array(linear.bias))
        return self.add(name, node, flat, (linear.out_features,))


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (C_out, C_in, kH, kW) and bias (C_out,), fp64, of the convolution that computes `norm(conv(x))` in
    evaluation: w γ/σ and (b - μ) γ/σ + β, with σ = sqrt(running variance + eps)."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    before = 0.0 if conv.bias is None else conv.bias.double()
    bias = (before - norm.running_mean.double()) * scale + norm.bias.double()
    return conv.weight.double() * scale[:, None, None, None], bias


def from_network(
    network: nn.Module,
    *,
    image_size: int,
    event_frames: bool = False,
    dt: float = DT,
    about: Mapping[str, str] | None = None,
) -> "nir.NIRGraph":
    """The graph of `network` as it computes in evaluation mode; `nir.write(path, graph)` puts it into a file.

    Nodes are named as the network's modules. Weights have the network's dtype, fp32 or fp64.

    Args:
        network: an MS-ResNet, or a SEW-ResNet with connect add or none; with hard reset; IF, LIF or PLIF.
        image_size: H = W of the images or frames, in pixels.
        event_frames: the network gets the frames of event recordings, one a step; else one image at all steps.
        dt: seconds of a time step, above 0.
        about: more metadata, beside T, dt and what NIR leaves open.

    Raises:
        ConfigError: NIR cannot say what the network does, or its package is not installed.
    """
    try:
        import nir
    except ImportError:
        raise ConfigError(f"a graph of NIR needs the package nir; which is not installed; run: {INSTALL}") from None
    if not (math.isfinite(dt) and dt > 0):
        raise ConfigError(f"dt={dt!r} is not allowed; use seconds above 0, SpikingJelly and snnTorch assume {DT}")
    if not isinstance(network, (SEWResNet, MSResNet)):
        raise ConfigError(
            f"{type(network).__name__} cannot be written as a graph of NIR; SEW-ResNet and MS-ResNet can: "
            "--format onnx and torch_export write any network"
        )
    writer = Writer(dt, network.fc.weight.dtype)
    x = writer.input((network.in_channels, image_size, image_size))
    x = _sew_resnet(writer, network, x) if isinstance(network, SEWResNet) else _ms_resnet(writer, network, x)
    writer.output(writer.mean_and_linear("avgpool", "fc", network.fc, x))
    metadata = {
        **(about or {}),
        "T": network.T,
        "dt": dt,
        "kind": "events" if event_frames else "images",
        "initial_potential": "v_reset",
        "fires_at": "v >= v_threshold",
        "readout": "mean of the output over T steps; "
        + ("a frame is" if event_frames else "an image is")
        + " the input of each",
    }
    return nir.NIRGraph(writer.nodes, writer.edges, metadata=metadata)


def _sew_resnet(writer: Writer, network: SEWResNet, x: Signal) -> Signal:
    """Writes all up to the last stage's spikes."""
    x = writer.neurons("sn1", network.sn1, writer.convolution("conv1", network.conv1, network.bn1, x))
    x = writer.max_pooling("maxpool", network.maxpool, x)
    for name, block in network.blocks():
        if block.connect not in ("add", "none"):
            raise ConfigError(
                f"NIR cannot say model.connect={block.connect!r} ({name}): it adds what meets at a node and does not "
                "multiply; train with --model.connect add or none"
            )
        branch = shortcut = x
        for neuron, conv, norm in block.feeds():
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            side_path = neuron == "downsample_sn"
            fed_by = "downsample.0" if side_path else neuron.replace("sn", "conv")
            current = writer.convolution(f"{name}.{fed_by}", conv, norm, x if side_path else branch)
            layer = block.get_submodule(neuron)
            assert isinstance(layer, Neuron)
            spikes = writer.neurons(f"{name}.{neuron}", layer, current)
            branch, shortcut = (branch, spikes) if side_path else (spikes, shortcut)
        x = branch + shortcut if block.connect == "add" else branch
    return x


def _ms_resnet(writer: Writer, network: MSResNet, x: Signal) -> Signal:
    """Writes all up to the last neurons' spikes."""
    x = writer.convolution("conv1", network.conv1, network.bn1, x)
    for name, block in network.blocks():
        shortcut = x
        if block.downsample is not None:
            conv, norm = block.downsample
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            shortcut = writer.convolution(f"{name}.downsample.0", conv, norm, x)
        spikes = writer.neurons(f"{name}.sn1", block.sn1, x)
        current = writer.convolution(f"{name}.conv1", block.conv1, block.bn1, spikes)
        spikes = writer.neurons(f"{name}.sn2", block.sn2, current)
        x = writer.convolution(f"{name}.conv2", block.conv2, block.bn2, spikes) + shortcut
    return writer.neurons("sn_out", network.sn_out, x)
