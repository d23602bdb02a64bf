"""BN, neurons and shortcut in one op, and the packing of what it keeps, against the plain definition."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.snn import membrane_probe
from pipeline.snn.kernels import compiled, norm, packing
from pipeline.snn.kernels.chunked import CHUNK
from pipeline.snn.kernels.reference import Rule
from pipeline.snn.networks import sew_resnet
from tests.support.snn_twins import new_tally, require_compiler


def one_side(run, y, shortcut, rule, T, static, train, weight):
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(y.shape[1]).train(train)
    with torch.no_grad():
        bn.weight.uniform_(0.5, 1.5)
        bn.bias.uniform_(-0.2, 0.6)
        assert bn.running_mean is not None
        bn.running_mean.uniform_(-0.1, 0.1)
    y = y.clone().requires_grad_()
    shortcut = None if shortcut is None else shortcut.clone().requires_grad_()
    leak = torch.tensor(0.4, requires_grad=True) if rule.leaky else None
    tally = new_tally()
    width, amplitude = torch.tensor(0.8), torch.tensor(1.25)
    out = run(y, bn, rule, width, amplitude, num_steps=T, static=static, leak=leak, shortcut=shortcut, tally=tally)
    (out.float() * weight).sum().backward()
    grads = [y.grad, bn.weight.grad, bn.bias.grad]
    grads += [shortcut.grad] if shortcut is not None else []
    grads += [leak.grad] if leak is not None else []
    return out, grads, (bn.running_mean, bn.running_var, bn.num_batches_tracked), tally


@pytest.mark.parametrize("T", [1, 4, CHUNK + 1])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("rule", "size", "added"),
    [
        (Rule(), (3, 16, 5, 7), True),
        (Rule(leaky=True, shape="atan"), (2, 24, 3, 3), False),
        (Rule(hard=False, detach=False, shape="rectangle"), (1, 130, 9, 1), True),
    ],
)
def test_the_fused_op_agrees_with_its_definition(rule, size, added, train, static, T):
    require_compiler()
    generator = torch.Generator().manual_seed(3)
    n, c, h, w = size
    y = torch.randn((n if static else T * n, c, h, w), generator=generator) * 2 + 5
    shape = (T * n, c, h, w)
    shortcut = torch.randint(0, 4, shape, generator=generator).float() if added else None
    weight = torch.randn(shape, generator=generator)
    out, grads, stats, tally = one_side(norm.run, y, shortcut, rule, T, static, train, weight)
    out_, grads_, stats_, tally_ = one_side(norm.run_reference, y, shortcut, rule, T, static, train, weight)
    # The normalised current differs by rounding; with these seeds no potential is that near to v_th.
    assert torch.equal(out, out_)
    assert (tally.spikes, tally.covered) == (tally_.spikes, tally_.covered)
    torch.testing.assert_close(tally.grad_sq, tally_.grad_sq, rtol=1e-5, atol=0)
    # Sums of up to 1300 fp32 terms (T times as many for a static current), and y has a mean of 2.5 deviations: the
    # tolerance is 1e-6 times some tens of the largest value, as terms of that size cancel in the smallest.
    for got, wanted in zip(grads, grads_, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-5 * max(1, wanted.abs().max().item()))
    for got, wanted in zip(stats, stats_, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_bf16_rounds_only_what_leaves_the_op():
    require_compiler()
    y = torch.randn(8, 32, 6, 6, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight = torch.randn(8, 32, 6, 6, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    out, grads, _, _ = one_side(norm.run, y, None, Rule(), 4, False, True, weight)
    out_, grads_, _, _ = one_side(norm.run, y.float(), None, Rule(), 4, False, True, weight)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out.float(), out_)
    # grad x is rounded to bf16 once before BN's last step and once after: 2^-8 of the largest of three terms each.
    torch.testing.assert_close(grads[0].float(), grads_[0], rtol=2**-6, atol=2**-7 * grads_[0].abs().max().item())
    torch.testing.assert_close(grads[1], grads_[1], rtol=1e-4, atol=1e-4)


def test_statistics_survive_a_mean_far_from_zero():
    require_compiler()
    y = torch.randn(2, 8, 64, 64, generator=torch.Generator().manual_seed(1)) + 1000
    y = y.contiguous(memory_format=torch.channels_last)
    bn = nn.BatchNorm2d(8)
    mean, var = norm._statistics(y, bn, compiled.Call)
    exact = y.double()
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), exact.var((0, 2, 3), unbiased=False), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("bits", "shape"), [(1, (2, 8, 3, 5)), (4, (3, 2, 7, 1)), (8, (1, 3, 3, 3))])
def test_packing_is_lossless(bits, shape, dtype):
    x = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        packed = packing.Packed(x.contiguous(memory_format=layout), bits)
        assert packed.data is not None
        assert packed.data.numel() * 8 == x.numel() * bits
        assert torch.equal(packed.unpack(), x)


def test_what_does_not_divide_into_bytes_is_kept_as_it_is():
    x = torch.ones(1, 3, 3, 3)
    conv = nn.Conv2d(3, 2, 3, bias=False)
    packed = packing.Packed(x, 1)
    assert packed.data is None
    packing.conv2d(x, packed, conv).sum().backward()
    assert conv.weight.grad is not None
    assert torch.equal(conv.weight.grad, torch.ones_like(conv.weight))


def test_packed_convolutions_and_pooling_have_the_gradients_of_plain_ones():
    generator = torch.Generator().manual_seed(4)
    s = (torch.rand(9, 8, 12, 12, generator=generator) < 0.3).float().contiguous(memory_format=torch.channels_last)
    conv = nn.Conv2d(8, 4, 3, bias=False)
    pool = nn.MaxPool2d(3, 2, 1)
    results = []
    for packed in (True, False):
        x = s.clone().requires_grad_()
        pooled = packing.max_pool2d(x, pool) if packed else pool(x)
        kept = packing.Packed(pooled, 1) if packed else None
        out = packing.conv2d(pooled, kept, conv)
        conv.weight.grad = None
        out.square().sum().backward()
        results.append((out, x.grad, conv.weight.grad))
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(("connect", "largest"), [("add", 4), ("and", 1), ("iand", 1)])
def test_the_largest_input_of_a_block_is_what_its_packing_expects(connect, largest):
    torch.manual_seed(0)
    net = sew_resnet.build(ModelConfig(arch="sew_cifar20", connect=connect, v_th=0.05), num_classes=4, image_size=16)
    seen = []
    for _, block in net.blocks():
        block.register_forward_pre_hook(lambda block, inputs: seen.append((block.bits_in, int(inputs[0].max()))))
    net(torch.randn(8, 3, 16, 16)).sum().backward()
    assert max(value for _, value in seen) == largest
    assert all(value < 2**bits for bits, value in seen)


def test_a_machine_that_cannot_compile_says_so_once_and_trains(tmp_path):
    code = """
import logging, torch
logging.basicConfig(level=logging.WARNING)
from pipeline.config import ModelConfig
from pipeline.snn.networks import sew_resnet
torch.manual_seed(0)
net = sew_resnet.build(ModelConfig(), num_classes=3, image_size=16)
out = net(torch.randn(4, 3, 16, 16))
out.sum().backward()
print(out.double().sum().item())
"""
    outputs = []
    for name, env in {"as it is": {}, "no compiler": {"CXX": "no-such-compiler"}}.items():
        cache = {"XDG_CACHE_HOME": str(tmp_path / name)}
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **cache, **env}, capture_output=True, text=True, check=True
        )
        if env:
            assert done.stderr.count("could not be compiled") == 1, (name, done.stderr)
            assert "install g++" in done.stderr
        outputs.append(float(done.stdout))
    # The same seed; the paths differ in the rounding of BN alone.
    assert outputs[0] == pytest.approx(outputs[1], rel=0.05)


@pytest.mark.parametrize("train", [True, False])
def test_the_probe_normalises_where_deepspeed_has_cast_the_parameters_to_fp16(train):
    bn = nn.BatchNorm2d(3).train(train)
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        bn.bias.copy_(torch.tensor([0.25, 0.0, -1.0]))
    y = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).half()
    wanted = membrane_probe.normalised(y.float(), bn)
    half = nn.BatchNorm2d(3).half().train(train)
    half.load_state_dict(bn.state_dict())
    got = membrane_probe.normalised(y, half)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)  # these parameters are exact in fp16
    half.running_mean, half.running_var = torch.zeros(3), torch.ones(3)  # and where the statistics stay in fp32
    torch.testing.assert_close(membrane_probe.normalised(y, half), wanted, rtol=0, atol=0)
