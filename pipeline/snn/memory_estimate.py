"""The memory that a training step keeps for its backward pass, from shapes: nothing is allocated.

Per layer, as kernels/norm.py and kernels/packing.py keep it: the convolution's output in the precision of the forward
pass (with `model.checkpoint` not even that), the convolution's input at 1 bit a spike or 4 bits a sum of spikes, and
the potentials between chunks of time (kernels/chunked.py).
The stem keeps the images and one output for all T; the pooling keeps 2 bytes an output; AND and IAND keep both inputs.
MS-ResNet keeps the currents of each sum too, with `model.checkpoint` as well.
Where no fused kernel runs (float64, no compiler on the CPU) the reference keeps several times more.
"""

from dataclasses import dataclass

import torch
from torch import nn

from pipeline.snn.kernels.chunked import CHUNK
from pipeline.snn.kernels.packing import bits_for
from pipeline.snn.networks.ms_resnet import MSResNet
from pipeline.snn.networks.network import Network
from pipeline.snn.networks.own import OwnNetwork, trial
from pipeline.snn.networks.sew_resnet import SEWResNet


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Neuron-steps and bytes of one micro-batch."""

    neuron_steps: int
    """T times the neurons of all layers and images."""
    kept_bytes: int
    """Bytes kept from the forward pass to the backward pass."""
    working_bytes: int
    """More bytes in the backward pass of the largest layer: its input unpacked, gradients of its output and input."""


def of(network: Network, images: tuple[int, ...], itemsize: int) -> Footprint:
    """The footprint of a training step on one micro-batch.

    Of a user's own network it is measured, on the CPU: what autograd keeps of 2 and of 3 images; their difference is
    one image's.

    Args:
        network: on the meta device; a user's own on the CPU.
        images: shape of the micro-batch, (N, C, H, W) or (T, N, C, H, W).
        itemsize: bytes of a number in the forward pass, 2 or 4.
    """
    if isinstance(network, OwnNetwork):
        return _measured(network, images, itemsize)
    static = len(images) == 4
    frames = torch.empty(images, device="meta") if static else torch.empty(images, device="meta").flatten(0, 1)
    if isinstance(network, MSResNet):
        layers, outputs, kept = _ms_resnet(network, frames, static, itemsize)
    else:
        assert isinstance(network, SEWResNet)
        layers, outputs, kept = _sew_resnet(network, frames, static, itemsize)
    kept += frames.numel() * itemsize
    kept += 0 if network.checkpoint else outputs * itemsize
    borders = (network.T - 1) // CHUNK  # between chunks
    kept += borders * 4 * sum(layers) // network.T
    return Footprint(neuron_steps=sum(layers), kept_bytes=kept, working_bytes=3 * max(layers) * itemsize)


def _sew_resnet(network: SEWResNet, frames: torch.Tensor, static: bool, itemsize: int) -> tuple[list[int], int, int]:
    """Neuron-steps of each layer; numbers that the convolutions put out; bytes kept beside these and the frames."""
    x, kept = network.conv1(frames), 0
    outputs = x.numel()
    if static:
        x = x.repeat(network.T, 1, 1, 1)
    layers = [x.numel()]
    if isinstance(network.maxpool, nn.MaxPool2d):
        x = network.maxpool(x)
        kept += 2 * x.numel()
    for _, block in network.blocks():
        inputs = x
        for index, (neuron, conv, _) in enumerate(block.feeds()):
            shortcut = neuron == "downsample_sn"  # its input is the block's, which is kept once
            if not shortcut:
                bits = (block.bits_in if index == 0 else bits_for(1)) or 8 * itemsize
                kept += x.numel() * bits // 8
            output = conv(inputs if shortcut else x)
            x = x if shortcut else output
            outputs += output.numel()
            layers.append(output.numel())
        if block.connect in ("and", "iand"):
            kept += 2 * x.numel() * itemsize
    return layers, outputs, kept


def _ms_resnet(network: MSResNet, frames: torch.Tensor, static: bool, itemsize: int) -> tuple[list[int], int, int]:
    """As `_sew_resnet`."""
    x, layers, kept = network.conv1(frames), [], 0
    outputs = x.numel()
    times = network.T if static else 1  # one step of currents stands for T of spikes
    for _, block in network.blocks():
        layers.append(times * x.numel())
        kept += x.numel() * itemsize  # the currents: for the neurons, and for the shortcut's convolution
        if block.downsample is not None:
            outputs += block.downsample[0](x).numel()
        spikes = x.repeat(times, 1, 1, 1)
        for conv in (block.conv1, block.conv2):
            kept += spikes.numel() * bits_for(1) // 8
            spikes = conv(spikes)  # of their shape
            outputs += spikes.numel()
        layers.append(spikes.numel())
        x, times = spikes, 1
    return [*layers, times * x.numel()], outputs, kept + x.numel() * itemsize


def _measured(network: OwnNetwork, images: tuple[int, ...], itemsize: int) -> Footprint:
    of_two, of_three = (_kept_by_autograd(network, (*images[:-4], N, *images[-3:]), itemsize) for N in (2, 3))
    N, largest = images[-4], max(of_two[1]) // 2
    return Footprint(
        neuron_steps=N * sum(of_two[1]) // 2,
        kept_bytes=N * (of_three[0] - of_two[0]),
        working_bytes=3 * N * largest * itemsize,
    )


def _kept_by_autograd(network: OwnNetwork, shape: tuple[int, ...], itemsize: int) -> tuple[int, list[int]]:
    """Bytes kept from the forward to the backward pass, weights among them; and the neuron-steps of every layer."""
    held: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with trial(network) as neurons:
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=itemsize == 2),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            logits = network(images)
        logits.float().square().sum().backward()
        return sum(held.values()) * max(1, itemsize // 4), [int(steps) for steps in neurons.neuron_steps.tolist()]
