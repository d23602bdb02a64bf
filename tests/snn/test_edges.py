"""Edge cases of a layer: uninitialised memory, NaN in one sample, no samples, shapes that do not fit."""

import re

import pytest
import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.snn import neurons
from pipeline.snn.kernels import dispatch, norm, packing
from pipeline.snn.kernels.reference import Rule
from pipeline.snn.networks import sew_resnet
from tests.support.snn_twins import new_tally, poison, require_compiler

WIDTH, AMPLITUDE = torch.tensor(0.8), torch.tensor(1.25)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def neuron_layer(rule: Rule, T: int, static: bool) -> list[torch.Tensor]:
    """Everything that a layer of neurons computes, of 3 x 131 neurons: the last block of 128 is not full."""
    x, v = numbers(1 if static else T, 3, 131).requires_grad_(), numbers(3, 131, seed=1).requires_grad_()
    leak = torch.tensor(0.4, requires_grad=True) if rule.leaky else None
    tally = new_tally()
    s, state = dispatch.run(
        x, rule, WIDTH, AMPLITUDE, num_steps=T if static else None, leak=leak, v=v, tally=tally, want_state=True
    )
    assert state is not None
    (s.sum() + state.square().sum()).backward()
    found = [s, state, x.grad, v.grad, tally.spikes, tally.covered, tally.grad_sq, *([leak.grad] if leak else [])]
    return [tensor.detach().clone() for tensor in found if tensor is not None]


def fused_layer(rule: Rule, T: int, static: bool, train: bool = True) -> list[torch.Tensor]:
    """Everything that BN, neurons and a shortcut compute in one op, of 5 channels at 7 x 9."""
    y = (numbers(2 if static else 2 * T, 5, 7, 9) + 0.5).requires_grad_()
    shortcut = numbers(2 * T, 5, 7, 9, seed=1).round().requires_grad_()
    bn, tally = nn.BatchNorm2d(5).train(train), new_tally()
    leak = torch.tensor(0.4, requires_grad=True) if rule.leaky else None
    out = norm.run(y, bn, rule, WIDTH, AMPLITUDE, num_steps=T, static=static, leak=leak, shortcut=shortcut, tally=tally)
    out.square().sum().backward()
    found = [out, y.grad, shortcut.grad, bn.weight.grad, bn.bias.grad, bn.running_mean, bn.running_var]
    found += [tally.spikes, tally.covered, tally.grad_sq, *([leak.grad] if leak else [])]
    return [tensor.detach().clone() for tensor in found if tensor is not None]


def packed_pool(rule: Rule, T: int, static: bool) -> list[torch.Tensor]:
    """Pooling and a convolution with packed inputs, of 9 images: pooled four at a time."""
    x = (numbers(9, 8, 12, 12) > 0.5).float().requires_grad_()
    conv = nn.Conv2d(8, 4, 3, bias=False)
    nn.init.constant_(conv.weight, 0.25)
    pooled = packing.max_pool2d(x, nn.MaxPool2d(3, 2, 1))
    out = packing.conv2d(pooled, packing.Packed(pooled, 1), conv)
    out.square().sum().backward()
    assert x.grad is not None
    assert conv.weight.grad is not None
    return [pooled.detach(), out.detach(), x.grad, conv.weight.grad]


@pytest.mark.parametrize(("T", "static"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("rule", [Rule(), Rule(leaky=True, hard=False, detach=False, shape="rectangle")])
@pytest.mark.parametrize("layer", [neuron_layer, fused_layer, packed_pool])
def test_every_element_of_every_buffer_is_written(layer, rule, T, static, monkeypatch):
    require_compiler()
    wanted = layer(rule, T, static)
    poison(monkeypatch)
    assert torch.empty(3).isnan().all()
    got = layer(rule, T, static)
    for a, b in zip(got, wanted, strict=True):
        assert not b.isnan().any()
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rule", [Rule(), Rule(leaky=True, shape="atan"), Rule(hard=False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bad_sample_leaves_the_others_alone(rule, value, dtype):
    neuron, state = nn.Sequential(neurons.Neuron(rule)), None
    clean = numbers(4, 5, 131).to(dtype) + 0.5
    bad = clean.clone()
    bad[1, 2, 3] = value
    spikes, grads, counts = [], [], []
    for x in (clean, bad):
        state = neurons.bind(neuron)
        x = x.requires_grad_()
        s = neuron(x)
        s.sum().backward()
        spikes.append(s)
        grads.append(x.grad)
        counts.append((int(state.spikes), int(state.covered), float(state.grad_sq)))
    others = torch.ones(4, 5, 131, dtype=torch.bool)
    others[:, 2, 3] = False
    for before, after in (spikes, grads):
        assert torch.equal(before[others], after[others])
    assert torch.isin(spikes[1][~others], torch.tensor([0, 1], dtype=dtype)).all()
    # At most the four steps of one neuron change the counts; g of a NaN is NaN, which the controller ignores.
    assert counts[1][0] == int(spikes[1].sum())
    assert abs(counts[1][1] - counts[0][1]) <= 4
    assert state is not None
    state.hold_rms(state.grad_sq, state.neuron_steps)
    assert state.amplitudes.tolist() == [1.0]


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_samples_give_no_spikes_and_no_counts(T, dtype):
    neuron, bn = neurons.Neuron(Rule()).to(dtype), nn.BatchNorm2d(5).to(dtype).eval()
    tally = new_tally()
    neuron.attach(WIDTH, AMPLITUDE, tally)
    x = torch.zeros(T, 0, 7, dtype=dtype, requires_grad=True)
    s, state = neuron.step(x, None)
    assert state is not None
    (s.sum() + state.sum()).backward()
    assert (s.shape, state.shape) == ((T, 0, 7), (0, 7))
    assert x.grad is not None
    assert x.grad.shape == x.shape
    y = torch.zeros(0, 5, 3, 3, dtype=dtype, requires_grad=True)
    for static in (False, True):
        out = neuron.after_norm(y, bn, T, static=static, shortcut=torch.zeros(0, 5, 3, 3, dtype=dtype))
        assert (out.shape, out.dtype) == ((0, 5, 3, 3), dtype)
        out.sum().backward()
    assert (tally.spikes, tally.covered, tally.grad_sq) == (0, 0, 0)


@pytest.mark.parametrize("arch", ["sew_tiny", "sew_resnet18"])
@pytest.mark.parametrize("frames", [False, True])
def test_a_network_evaluates_an_empty_batch(arch, frames):
    net = sew_resnet.build(ModelConfig(arch=arch, T=3), num_classes=5, image_size=32).eval()
    with torch.no_grad():
        logits = net(torch.zeros(*([3] if frames else []), 0, 3, 32, 32))
    assert logits.shape == (3, 0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_that_do_not_fit_are_refused_by_name(dtype):
    # Kernels take addresses: a tensor that is too short would be read past its end.
    neuron, bn = neurons.Neuron(Rule()), nn.BatchNorm2d(4).eval().to(dtype)
    y = torch.zeros(6, 4, 2, 2, dtype=dtype)
    with pytest.raises(ValueError, match=re.escape("y of shape (6, 4, 2, 2) does not hold num_steps=4 steps")):
        neuron.after_norm(y, bn, 4)
    with pytest.raises(ValueError, match=re.escape("shortcut of shape (2, 4, 2, 2) is not allowed; use (6, 4, 2, 2)")):
        neuron.after_norm(y, bn, 3, shortcut=y[:2])
    with pytest.raises(ValueError, match=re.escape("shortcut of shape (6, 4, 2, 2) is not allowed; use (18, 4, 2, 2)")):
        neuron.after_norm(y, bn, 3, static=True, shortcut=y)
    with pytest.raises(ValueError, match=re.escape("x holds 6 steps and num_steps=4; use 4, or 1 for a current")):
        neuron(y, num_steps=4)
    with pytest.raises(ValueError, match=re.escape("v of shape (1, 2, 2) is not allowed; use (4, 2, 2)")):
        neuron.step(y, torch.zeros(1, 2, 2, dtype=dtype))


@pytest.mark.parametrize("size", [(2, 2), (3, 8), (9, 7), (12, 12)])
@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, 2), nn.MaxPool2d(3, 1, 1)], ids=str)
def test_deterministic_pooling_has_torchs_gradient_without_its_atomics(pool, size, monkeypatch):
    generator = torch.Generator().manual_seed(7)
    spikes = (torch.rand(6, 3, *size, generator=generator) < 0.4).double()  # many windows with equal maxima
    ours, theirs = (spikes.clone().requires_grad_() for _ in range(2))
    expected = pool(theirs)
    weights = torch.randint(-8, 9, expected.shape, generator=generator).double()
    (expected * weights).sum().backward()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)

    with torch.profiler.profile() as profiler:
        (packing.max_pool2d(ours, pool) * weights).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)
    called = {event.key for event in profiler.key_averages()}
    assert "aten::max_pool2d_with_indices" in called
    assert "aten::max_pool2d_with_indices_backward" not in called
