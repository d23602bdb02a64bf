"""Every Triton kernel compiles for real GPUs without a spill, and the committed table names every one."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed; triton==3.7.1 fits torch 2.13", allow_module_level=True)

from benchmarks import kernel_table, launches
from pipeline.config import ModelConfig
from pipeline.snn import neurons
from pipeline.snn.kernels.chunked import CHUNK
from tests.conftest import ROOT

BF16, FP32 = torch.bfloat16, torch.float32
FULL = {"neuron": "plif", "reset": "soft", "detach_reset": False}
"""All that a neuron's backward pass can have to hold."""


@pytest.fixture
def cache(tmp_path, monkeypatch) -> None:
    if kernel_table.why_not():
        pytest.skip(kernel_table.why_not())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def spilling(made: list[launches.Launch], capability: int) -> list[str]:
    """The variants of the launches that spill, with what they were compiled for."""
    found = kernel_table.variants({64: made}, capability)
    assert found
    figures = [(variant, kernel_table.figures(variant, capability)) for variant in found]
    assert all(one["registers"] > 8 for _, one in figures)
    return [f"{variant.kernel} {variant.constants}: {one}" for variant, one in figures if one["spilled_bytes"]]


def test_no_kernel_of_the_network_spills_and_none_is_left_out(cache):
    made = kernel_table.noted(BF16, 64, arch="sew_resnet18")
    assert {launch.kernel for launch in made} == set(launches.kernels())
    assert spilling(made, 90) == []


@pytest.mark.parametrize(("dtype", "capability", "shape"), [(FP32, 80, "atan"), (BF16, 100, "sigmoid")])
def test_neurons_with_a_leak_and_a_reset_in_the_gradient_do_not_spill(dtype, capability, shape, cache):
    neuron = neurons.from_config(ModelConfig(surrogate=shape, **FULL)).to("meta")
    neurons.bind(neuron)
    x = torch.empty(4, 2, 64, 56, 56, dtype=dtype, device="meta", requires_grad=True)
    with launches.noted() as alone:
        spikes, state = neuron.step(x, torch.empty(x.shape[1:], device="meta", requires_grad=True))
        assert state is not None
        torch.autograd.backward((spikes, state), (torch.empty_like(spikes), torch.empty_like(state)))
    assert [launch.arguments["FROM_STATE"] and launch.arguments["TO_STATE"] for launch in alone] == [True, True]
    of_network = kernel_table.noted(dtype, 64, arch="sew_resnet18", surrogate=shape, **FULL)
    of_neurons = [launch for launch in of_network if launch.name in ("forward", "backward")]
    assert spilling([*alone, *of_neurons], capability) == []


def test_the_most_steps_of_a_call_do_not_spill(cache):
    made = kernel_table.noted(BF16, 2, arch="sew_resnet18", T=CHUNK, **FULL)
    assert spilling([launch for launch in made if launch.name == "backward"], 90) == []


@pytest.mark.parametrize("name", ["width_ptr", "amplitude_ptr", "partial_ptr", "sum_ptr", "product_ptr"])
def test_one_variant_serves_every_alignment_of_a_layers_part_of_a_vector(name):
    launch = next(one for one in kernel_table.noted(BF16, 2, arch="sew_resnet18") if one.name == "backward")
    vector = torch.zeros(64)
    parts = [replace(launch, arguments={**launch.arguments, name: vector[at:]}) for at in (0, 1)]
    assert len(kernel_table.variants({2: parts}, 90)) == 1
    of_x = [replace(launch, arguments={**launch.arguments, "x_ptr": vector.bfloat16()[at:]}) for at in (0, 1)]
    assert len(kernel_table.variants({2: of_x}, 90)) == 2, "whole tensors are loaded in vectors where they are aligned"


def test_a_spill_is_seen(cache):
    launch = next(one for one in kernel_table.noted(BF16, 64, arch="sew_resnet18") if one.name == "backward")
    launch.options["maxnreg"] = 32
    assert len(spilling([launch], 90)) == 1


def test_the_committed_table_has_every_kernel_and_no_spill():
    report = json.loads((ROOT / "benchmarks" / "results" / "kernel_table.json").read_text())
    lines = report["kernels"]
    names = {kernel.fn.__name__.lstrip("_") for kernel in launches.kernels()}
    assert {line["kernel"] for line in lines} == names, f"run {report['command']}"
    for line in lines:
        assert [*line["figures"]] == [*kernel_table.ARCHITECTURES]
        assert all(one["spilled_bytes"] == 0 for one in line["figures"].values())
    assert {line["dtype"] for line in lines} == set(launches.DTYPES)
    assert not any(row["met"] is False for row in report["rows"])
    page = (ROOT / "docs" / "snn.md").read_text()
    assert "\n".join(kernel_table.by_kernel(lines)) in page
