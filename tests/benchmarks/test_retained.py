"""What benchmarks/retained.py expects a layer to keep is what autograd saves, here and in SpikingJelly."""

import importlib.util
import json

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed; triton==3.7.1 fits torch 2.13", allow_module_level=True)

from benchmarks import launches, retained
from pipeline.config import ModelConfig
from pipeline.snn import memory_estimate, neurons
from pipeline.snn.kernels import compiled
from pipeline.snn.networks.build import build
from tests.conftest import ROOT
from tests.support import peers


def agree(expected: dict, counted: dict) -> None:
    assert expected.keys() == counted.keys()
    for name, (by_dtype, sizes) in retained.compared(expected, counted).items():
        assert sizes == pytest.approx(by_dtype, abs=0.01), name


def test_the_ops_keep_on_the_gpu_path_what_the_table_says():
    agree(retained.OURS, retained.ours())


def test_the_peers_ops_keep_what_the_table_says():
    peers.spikingjelly()
    agree(retained.PEER, retained.peer())


def test_the_cpu_path_keeps_as_much_as_the_gpu_path():
    if compiled.library(torch.zeros(1)) is None:
        pytest.skip(f"compiling does not work here: {compiled.why_not()}")
    neuron, bn = neurons.from_config(ModelConfig(T=2)), torch.nn.BatchNorm2d(16)
    neurons.bind(neuron)
    y = torch.randn(4, 16, 8, 8, dtype=torch.bfloat16, requires_grad=True).clone(memory_format=torch.channels_last)
    parameters = tuple(bn.parameters())
    for op in (lambda: neuron(y.unflatten(0, (2, -1))), lambda: neuron.after_norm(y, bn, 2)):
        assert retained.saved(op, parameters)["bfloat16"] == y.nbytes


@pytest.mark.parametrize("fields", [{}, {"connect": "iand", "T": 8}, {"arch": "ms_resnet18"}])
def test_the_footprint_by_shapes_is_what_the_network_keeps_on_the_gpu_path(fields):
    fields = {"arch": "sew_resnet18", **fields}
    net = launches.network(torch.bfloat16, **fields)
    shape = (16, 3, 224, 224)
    images = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    with launches.noted():
        counted = sum(retained.saved(lambda: net(images), tuple(net.parameters())).values())
    with torch.device("meta"):
        network = build(ModelConfig(**fields), num_classes=1000, image_size=224)
    assert memory_estimate.of(network, shape, 2).kept_bytes == pytest.approx(counted, rel=0.05)


def test_the_committed_table_is_the_present_one():
    report = json.loads((ROOT / "benchmarks" / "results" / "retained.json").read_text())
    assert report["tensors"] == json.loads(json.dumps({"ours": retained.OURS, "peer": retained.PEER}))
    assert "\n".join(retained.markdown()) in (ROOT / "docs" / "snn.md").read_text()
