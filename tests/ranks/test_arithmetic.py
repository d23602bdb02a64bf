"""The switches that a configuration sets in torch, and operations that differ in every run on a GPU."""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.chi.widths import Widths
from pipeline.config import ChiConfig, ModelConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.ranks import arithmetic
from pipeline.snn import losses
from pipeline.snn.networks import sew_resnet
from pipeline.snn.neurons import bind

DIFFER = (
    "adaptive_avg_pool2d_backward",
    "adaptive_max_pool2d_backward",
    "avg_pool3d_backward",
    "bincount",
    "cumsum",
    "embedding_bag",
    "grid_sampler",
    "histc",
    "index_add",
    "index_reduce",
    "max_unpool2d",
    "median",
    "nll_loss2d",
    "put_",
    "reflection_pad",
    "scatter_add",
    "scatter_reduce",
    "upsample",
)
"""Parts of names of operations for which torch has no deterministic form on a GPU, by its documentation, and a few that
it makes deterministic at a cost. The max-pooling has its own test, in tests/snn/test_edges.py."""


@pytest.fixture(autouse=True)
def put_back(monkeypatch):
    monkeypatch.delenv(arithmetic.WORKSPACE, raising=False)
    yield
    os.environ.pop(arithmetic.WORKSPACE, None)
    arithmetic.choose(TrainConfig())


def test_fp32_is_exact_unless_tf32_is_asked_for():
    for tf32 in (False, True, False):
        arithmetic.choose(TrainConfig(precision="fp32", tf32=tf32))
        assert torch.backends.cuda.matmul.allow_tf32 == tf32
        assert torch.backends.cudnn.allow_tf32 == tf32
        assert (torch.backends.cuda.matmul.fp32_precision == "tf32") == tf32
        conv = torch.backends.cudnn.conv.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
        assert (conv == "tf32") == tf32
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        with torch.backends.cudnn.flags(enabled=False):  # as torch.export does: it reads every switch
            pass
        assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    with pytest.raises(ConfigError, match=r"train.tf32=True is not allowed; use it with train.precision fp32"):
        TrainConfig(precision="bf16", tf32=True)


def test_deterministic_sets_torch_cudnn_and_cublas_and_takes_it_back():
    arithmetic.choose(TrainConfig(deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ[arithmetic.WORKSPACE] == ":4096:8"
    arithmetic.choose(TrainConfig())
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


def test_a_workspace_that_breaks_the_promise_is_refused(monkeypatch):
    monkeypatch.setenv(arithmetic.WORKSPACE, ":0:0")
    with pytest.raises(ConfigError, match=r"=':0:0' in the environment .* use :4096:8 or :16:8, or leave it unset"):
        arithmetic.choose(TrainConfig(deterministic=True))
    arithmetic.choose(TrainConfig())  # without it the value is the user's own affair


def test_an_operation_without_a_deterministic_form_is_named_in_a_line():
    arithmetic.choose(TrainConfig(deterministic=True))
    with pytest.raises(ConfigError, match=r"^train.deterministic=True is not .*: put_ has no form .* false$"), \
         arithmetic.explained():  # fmt: skip
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    with pytest.raises(RuntimeError, match="something else"), arithmetic.explained():
        raise RuntimeError("something else")


class Operations(TorchDispatchMode):
    """Notes the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("arch", ["sew_tiny", "sew_resnet18", "sew_resnet50"])
@pytest.mark.parametrize("loss", ["ce", "tet"])
def test_a_step_uses_no_operation_that_differs_in_every_run_on_a_gpu(arch, loss):
    network = sew_resnet.build(ModelConfig(arch=arch, T=2, neuron="plif"), num_classes=7, image_size=32)
    neurons = bind(network)
    widths = Widths(ChiConfig(calibrate=True), network.spiking_layers(), neurons)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 5])
    widths.calibrate(network, images)
    with Operations() as seen:
        train = TrainConfig(loss=loss, label_smoothing=0.1)
        losses.loss(train, network(images), labels).backward()
    assert any("convolution_backward" in name for name in seen.names)
    assert [name for name in seen.names if any(part in name for part in DIFFER)] == []
