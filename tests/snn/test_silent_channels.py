"""Channels whose variance is 0: running statistics and weights stay finite, and equal those of torch's BatchNorm.

1 / sqrt(var) is infinite there, and one NaN in a running variance is there for good.
"""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.snn.kernels import compiled, dispatch
from pipeline.snn.losses import cross_entropy
from pipeline.snn.networks import sew_resnet
from pipeline.snn.networks.sew_resnet import SEWResNet
from tests.support.snn_twins import require_compiler

MICRO_BATCHES = 3
SILENT = {"first": {0}, "middle": {1}, "every": {0, 1, 2}}
"""Which micro-batches of a step."""


def images(what: str, when: str) -> list[Tensor]:
    """A step's micro-batches: `what` is a red channel of zeros, or a whole micro-batch of zeros."""
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randn(2, 3, 6, 6, generator=generator) for _ in range(MICRO_BATCHES)]
    for at in SILENT[when]:
        (batches[at][:, 0] if what == "channel" else batches[at]).zero_()
    return batches


def only_red(network: SEWResNet) -> None:
    """Lets the stem's first filter see the red channel alone."""
    with torch.no_grad():
        network.conv1.weight[0, 1:] = 0


def trained(start: SEWResNet, batches: list[Tensor], dtype: torch.dtype) -> tuple[SEWResNet, set[int]]:
    """A copy of the network after one update; and in which micro-batches the stem's first channel was silent."""
    network = copy.deepcopy(start)
    variance, silent = network.bn1.running_var, set()
    assert variance is not None
    for at, batch in enumerate(batches):
        before = variance[0].clone()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = network(batch)
        cross_entropy(logits, torch.tensor([1, 4])).backward()
        if variance[0] == before.lerp(torch.zeros(()), 0.1):  # BN's momentum
            silent.add(at)
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    return network, silent


def assert_same(ours: nn.Module, theirs: nn.Module, start: nn.Module, dtype: torch.dtype) -> None:
    """The same change of every weight and of every running statistic, each against the largest of its tensor."""
    before, wanted = start.state_dict(), theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert tensor.isfinite().all(), name
        change, expected = tensor - before[name], wanted[name] - before[name]
        if dtype == torch.float32:
            share = 3e-4  # sums of terms that cancel
        elif "running" in name or "tracked" in name:
            share = 2**-8
        elif name.endswith(".w"):
            continue  # one sum of terms that cancel: in bf16 little of it is left
        else:
            share = 2**-3  # BN takes from gradients in bf16 their mean, and in a silent channel all are nearly equal
        torch.testing.assert_close(change, expected, rtol=0, atol=share * expected.abs().max().item(), msg=name)


def start_of(connect: str, neuron: str) -> SEWResNet:
    torch.manual_seed(0)
    model = ModelConfig(arch="sew_tiny", connect=connect, neuron=neuron, T=2, v_th=0.5)
    network = sew_resnet.build(model, num_classes=5, image_size=6)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1  # else each silent layer multiplies the gradient, and its rounding, by 316
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.4)
    only_red(network)
    return network


def compare(start: SEWResNet, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for what, when in itertools.product(("channel", "batch"), SILENT):
        batches = images(what, when)
        ours, silent = trained(start, batches, dtype)
        assert silent == SILENT[when]
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "choose", lambda x, rule: None)
            theirs, _ = trained(start, batches, dtype)
        assert_same(ours, theirs, start, dtype)


@pytest.fixture(autouse=True)
def one_thread():
    require_compiler()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these tensors are small
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("neuron", ["if", "lif", "plif"])
@pytest.mark.parametrize("connect", ["add", "and", "iand", "none"])
def test_a_network_trains_through_silence_as_the_reference_does(connect, neuron, dtype, monkeypatch):
    compare(start_of(connect, neuron), dtype, monkeypatch)


def test_the_statistics_of_a_gpu_are_those_of_the_reference(monkeypatch):
    """`torch.batch_norm_stats` gives 1 / sqrt(var + eps) alone, and 0 where eps and variance are 0."""
    kernels = pytest.importorskip("pipeline.snn.kernels.fused_triton", reason="triton is not installed")

    def as_on_a_gpu(y: Tensor) -> tuple[Tensor, Tensor]:
        var, mean = torch.var_mean(y.float(), (0, 2, 3), correction=0)
        return mean, kernels.variance_of(torch.where(var != 0, var.rsqrt(), 0.0))

    monkeypatch.setattr(compiled.Call, "statistics", staticmethod(as_on_a_gpu))
    compare(start_of("add", "lif"), torch.float32, monkeypatch)
