"""Counts of kernel launches: they do not grow with the batch, and no layer costs more than a handful."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed; triton==3.7.1 fits torch 2.13", allow_module_level=True)

from benchmarks import launches


def calls(batch: int) -> list[int]:
    """Launches of one forward and one backward pass."""
    images = torch.empty(batch, 3, 64, 64, device="meta", dtype=torch.bfloat16)
    network = launches.network(torch.bfloat16, arch="sew_resnet18")
    return [one.total for one in launches.trace(network, images)]


def test_launches_do_not_grow_with_the_batch():
    assert calls(2) == calls(64)


def test_a_layer_takes_a_handful_of_launches():
    forward, backward = calls(2)
    layers = 20  # convolutions, each with its normalisation and neurons
    assert forward <= 5 * layers + 16  # convolution, statistics, scales, neurons, packing; once: pool, mean, loss
    assert backward <= 8 * layers + 16  # unpacking, neurons, three sums, BN's gradients, affine, convolution


def test_kernels_are_themselves_again_after_a_count():
    before = dict(vars(launches.fused_triton))
    calls(2)
    assert vars(launches.fused_triton) == before
