"""Memory that training keeps between the passes; `model.checkpoint` reduces it and changes no number."""

import pytest
import torch
from torch import nn

from benchmarks.neuron_bytes_side import kept, kept_by, our_ops
from pipeline.config import ModelConfig
from pipeline.snn import losses, memory_estimate, neurons
from pipeline.snn.kernels import compiled
from pipeline.snn.networks import sew_resnet
from pipeline.snn.networks.build import build


def require_compiler() -> None:
    if compiled.library(torch.zeros(1)) is None:
        pytest.skip(f"compiling does not work here: {compiled.why_not()}")


def train_once(checkpoint: bool, arch: str, images: torch.Tensor, dtype: torch.dtype, **fields):
    """One step's logits, gradients, buffers and counters, and the bytes per neuron-step kept for its backward pass."""
    torch.manual_seed(0)
    model = ModelConfig(arch=arch, checkpoint=checkpoint, **fields)
    net = build(model, num_classes=5, image_size=32)
    if dtype == torch.float64:
        net, images = net.double(), images.double()
    state = neurons.bind(net)
    logits = []

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits.append(net(images))

    kept = kept_by(forward)
    losses.cross_entropy(logits[0], torch.arange(images.shape[-4]) % 5).backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    counters = {"spikes": state.spikes, "covered": state.covered, "grad_sq": state.grad_sq}
    weights = sum(parameter.numel() for parameter in net.parameters()) * (2 if dtype == torch.bfloat16 else 0)
    results = {"logits": logits[0], **gradients, **buffers, **counters}
    return results, (kept - weights) / int(state.neuron_steps.sum())


def test_the_fused_op_keeps_two_bytes_a_neuron_step_and_checkpointed_blocks_a_third_of_one():
    """The kept bytes that docs/snn.md states, with the bf16 weights of two convolutions beside them."""
    require_compiler()
    T, N, C, size = 4, 2, 64, 28
    y = torch.randn(T * N, C, size, size).bfloat16().contiguous(memory_format=torch.channels_last)
    shortcut = (torch.rand(y.shape) < 0.2).to(y.dtype).contiguous(memory_format=torch.channels_last)
    scalars = 40 * C * 4  # BN's statistics and affine map, by channel
    for checkpoint, block in ((False, 2 + 0.3125), (True, 0.3125)):
        ops = our_ops(T, C, checkpoint)
        found = [{name: kept(op, lambda: None, y, shortcut) for name, op in ops.items()} for _ in range(2)][1]
        weights = 2 * 2 * 9 * C * C
        assert found.pop("block") == pytest.approx(block * 2 * y.numel() + weights, abs=scalars)
        assert all(value == pytest.approx(2 * y.numel(), abs=scalars) for value in found.values())


@pytest.mark.parametrize(
    ("arch", "frames", "dtype", "fields", "most"),
    [
        # Packed inputs are 1/8 or 1/2 byte; without the option a neuron-step keeps 4 bytes more in fp32, 2 in bf16.
        ("sew_cifar20", False, torch.float32, {"T": 16}, 0.4),
        # In addition: potentials of 4 bytes between chunks of 16 steps, 1/5 of a byte a neuron-step.
        ("sew_cifar20", False, torch.float32, {"T": 40}, 0.6),
        # The frames themselves, of 3 channels in fp32 and bf16, are 0.16 of a byte.
        ("sew_cifar20", True, torch.bfloat16, {"neuron": "plif", "reset": "soft"}, 0.5),
        # `and` keeps both of its operands as dense spikes.
        ("sew_tiny", False, torch.bfloat16, {"T": 16, "connect": "and", "surrogate": "atan"}, 2.2),
        # The currents of every second layer stay: 1 and 2 bytes a neuron-step of all, beside the packed spikes.
        ("ms_cifar20", True, torch.bfloat16, {"T": 16}, 1.5),
        ("ms_resnet18", False, torch.float32, {"T": 4, "neuron": "plif"}, 2.7),
        # Small maps of 2048 channels: the bottleneck's BN scalars and, at the stem, the pooling.
        ("sew_resnet50", False, torch.float32, {"T": 4}, 0.8),
    ],
)
def test_the_option_keeps_less_and_changes_no_bit(arch, frames, dtype, fields, most):
    require_compiler()
    images = torch.randn((16, 2, 3, 32, 32) if frames else (2, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    plain, plain_kept = train_once(False, arch, images, dtype, **fields)
    again, again_kept = train_once(True, arch, images, dtype, **fields)
    assert plain.keys() == again.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, again[name]), name
    assert all(tensor == 1 for name, tensor in again.items() if name.endswith("num_batches_tracked"))
    assert again["spikes"].min() > 0
    width = 2 if dtype == torch.bfloat16 else 4
    assert again_kept < most
    assert again_kept < plain_kept - 0.75 * width


def test_the_reference_trains_the_same_with_the_option():
    images = torch.randn((2, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    plain, again = (train_once(on, "sew_tiny", images, torch.float64)[0] for on in (False, True))
    for name, tensor in plain.items():
        assert torch.equal(tensor, again[name]), name


def test_weights_that_changed_before_the_backward_pass_are_refused():
    require_compiler()
    net = sew_resnet.build(ModelConfig(checkpoint=True), num_classes=5, image_size=16)
    logits = net(torch.randn(2, 3, 16, 16))
    with torch.no_grad():
        block = net.blocks()[-1][1]
        convolution: nn.Conv2d = block.get_submodule("conv2")  # pyright: ignore[reportAssignmentType]
        convolution.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"weights changed between .* step the optimizer after the backward pass"):
        logits.sum().backward()


def test_a_backward_pass_frees_what_was_kept_while_the_loss_lives():
    require_compiler()
    torch.manual_seed(0)
    net = sew_resnet.build(ModelConfig(arch="sew_cifar20", T=16, checkpoint=True), num_classes=5, image_size=32)
    images = torch.randn(2, 3, 32, 32)
    sums = []

    def step() -> None:
        sums.append(net(images).sum())
        sums[-1].backward()
        net.zero_grad()

    step()
    # Of 6.4 million neuron-steps; the forward pass alone keeps some 2 MB of packed spikes.
    assert kept_by(step) < 200_000


@pytest.mark.parametrize(
    ("arch", "dtype", "fields"),
    [
        ("sew_cifar20", torch.float32, {}),
        ("sew_cifar20", torch.float32, {"T": 40, "checkpoint": True}),
        ("sew_resnet18", torch.bfloat16, {}),
        ("sew_tiny", torch.bfloat16, {"connect": "iand"}),
        ("sew_cifar14", torch.float32, {"connect": "none"}),
        ("ms_cifar20", torch.float32, {}),
        ("ms_cifar20", torch.float32, {"T": 40, "checkpoint": True}),
        ("ms_resnet18", torch.bfloat16, {}),
    ],
)
def test_the_footprint_by_shapes_is_what_a_step_keeps(arch, dtype, fields):
    require_compiler()
    model, shape = ModelConfig(arch=arch, **fields), (16, 3, 32, 32)
    with torch.device("meta"):
        counted = memory_estimate.of(build(model, num_classes=5, image_size=32), shape, dtype.itemsize)
    net, images, logits = build(model, num_classes=5, image_size=32), torch.randn(shape), []
    state = neurons.bind(net)

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits.append(net(images))

    kept = kept_by(forward)
    copies = sum(parameter.numel() for parameter in net.parameters()) * (2 if dtype == torch.bfloat16 else 0)
    logits[0].sum().backward()
    assert counted.neuron_steps == int(state.neuron_steps.sum())
    assert counted.kept_bytes + copies == pytest.approx(kept, rel=0.05)
