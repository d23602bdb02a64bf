"""The GPU kernels' arithmetic, in Triton's interpreter on the CPU; tests/snn/test_triton.py runs this file.

    TRITON_INTERPRET=1 python -m pytest tests/snn/snn_triton_cases.py

It needs its own process: Triton reads the variable at import, and other tests import it without.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.snn.kernels import dispatch, norm, packing, reference
from pipeline.snn.kernels import fused_triton as kernels
from pipeline.snn.kernels.chunked import CHUNK
from pipeline.snn.kernels.reference import Rule
from tests.support.snn_twins import new_tally


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Every op on the CPU goes through the Triton kernels, as on a GPU."""
    monkeypatch.setattr(dispatch, "choose", lambda x, rule: kernels.Call if x.numel() else None)
    monkeypatch.setattr(
        dispatch,
        "gpu_kernels",
        lambda x: kernels if x.dtype in (torch.float32, torch.bfloat16, torch.float16) else None,
    )
    monkeypatch.setattr(packing.compiled, "library", lambda *_: None)


RULES = [
    Rule(),
    Rule(hard=False, detach=False, shape="rectangle", v_th=0.75, scale="peak"),
    Rule(leaky=True, v_reset=-0.25, shape="atan"),
    Rule(leaky=True, hard=False, shape="sigmoid", scale="peak"),
    Rule(detach=False, v_reset=0.125),
]


@pytest.mark.parametrize("T", [1, 4, 17])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{'lif' if rule.leaky else 'if'}-{rule.hard}-{rule.shape}")
def test_neurons_give_the_reference_bits(rule, T):
    generator = torch.Generator().manual_seed(5)
    # 777 neurons: the last tile is partly empty. Multiples of 1/8 put many potentials exactly at v_th.
    x = torch.randint(-4, 12, (T, 3, 7, 37), generator=generator) / (4 if rule.leaky else 8)
    v0 = torch.randint(-4, 6, (3, 7, 37), generator=generator) / 8
    weight_s, weight_v = (torch.randn(y.shape, generator=generator) for y in (x, v0))
    width, amplitude = torch.tensor(0.5), torch.tensor(1.5)
    results = []
    for run in (reference.run, dispatch.run):
        x_, v_ = x.clone().requires_grad_(), v0.clone().requires_grad_()
        leak = torch.tensor(0.5, requires_grad=True) if rule.leaky else None
        extra: dict = {"want_state": True} if run is dispatch.run else {}
        tally = new_tally()
        s, v = run(x_, rule, width, amplitude, leak=leak, v=v_, tally=tally, **extra)
        assert v is not None
        ((s * weight_s).sum() + (v * weight_v).sum()).backward()
        results.append((s, v, x_.grad, v_.grad, None if leak is None else leak.grad, tally))
    (s, v, dx, dv, dleak, tally), (s_, v_out, dx_, dv_, dleak_, tally_) = results
    assert torch.equal(s, s_)
    assert torch.equal(v, v_out)
    assert (tally.spikes, tally.covered) == (tally_.spikes, tally_.covered)
    assert tally.spikes > 0
    # The same operations, but autograd adds the two terms of grad h in another order (1 ulp a step), and sigmoid and
    # atan divide in another order.
    torch.testing.assert_close(dx_, dx, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dv_, dv, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tally_.grad_sq, tally.grad_sq, rtol=1e-5, atol=0)
    if dleak is not None:
        torch.testing.assert_close(dleak_, dleak, rtol=1e-4, atol=1e-4)


def one_side(run, y, shortcut, rule, T, static, train, weight):
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(y.shape[1]).train(train)
    with torch.no_grad():
        bn.weight.uniform_(0.5, 1.5)
        bn.bias.uniform_(-0.2, 0.6)
    y = y.clone().requires_grad_()
    shortcut = None if shortcut is None else shortcut.clone().requires_grad_()
    tally = new_tally()
    width, amplitude = torch.tensor(0.8), torch.tensor(1.25)
    out = run(y, bn, rule, width, amplitude, num_steps=T, static=static, shortcut=shortcut, tally=tally)
    (out.float() * weight).sum().backward()
    grads = [y.grad, bn.weight.grad, bn.bias.grad, *([] if shortcut is None else [shortcut.grad])]
    return out, grads, (bn.running_mean, bn.running_var), tally


@pytest.mark.parametrize(
    ("T", "size", "static", "train", "added", "dtype"),
    [
        (4, (2, 16, 5, 7), False, True, True, torch.float32),
        (4, (2, 16, 5, 7), False, False, False, torch.float32),
        (4, (1, 72, 9, 1), True, True, True, torch.float32),
        (4, (3, 1, 9, 7), False, True, True, torch.float32),
        (4, (2, 24, 3, 3), False, True, True, torch.bfloat16),
        (CHUNK + 1, (1, 8, 3, 3), False, True, True, torch.float32),
        (CHUNK + 2, (2, 8, 3, 3), True, True, False, torch.float32),
    ],
)
def test_the_fused_op_agrees_with_its_definition(T, size, static, train, added, dtype):
    generator = torch.Generator().manual_seed(3)
    n, c, h, w = size
    y = (torch.randn((n if static else T * n, c, h, w), generator=generator) * 2 + 1).to(dtype)
    shape = (T * n, c, h, w)
    shortcut = torch.randint(0, 4, shape, generator=generator).to(dtype) if added else None
    weight = torch.randn(shape, generator=generator).to(dtype).float()
    out, grads, stats, tally = one_side(norm.run, y, shortcut, Rule(), T, static, train, weight)
    wide = None if shortcut is None else shortcut.float()
    out_, grads_, stats_, tally_ = one_side(norm.run_reference, y.float(), wide, Rule(), T, static, train, weight)
    assert out.dtype == dtype
    assert torch.equal(out.float(), out_)
    assert (tally.spikes, tally.covered) == (tally_.spikes, tally_.covered)
    # Gradients leave the kernel in y's dtype: two roundings in bf16; sums of some hundred terms in fp32.
    rtol, atol = (2**-6, 2**-6) if dtype == torch.bfloat16 else (2e-4, 2e-5)
    for got, wanted in zip(grads, grads_, strict=True):
        torch.testing.assert_close(got.float(), wanted, rtol=rtol, atol=atol * max(1, wanted.abs().max().item()))
    for got, wanted in zip(stats, stats_, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_a_silent_channel_has_a_variance_of_zero_and_leaves_its_running_variance_finite():
    variance = torch.tensor([0.0, 1e-12, 4.0])
    rstd = torch.where(variance > 0, variance.rsqrt(), 0.0)  # what torch.batch_norm_stats gives on a GPU for eps 0
    torch.testing.assert_close(kernels.variance_of(rstd), variance, rtol=1e-6, atol=0)


def test_what_lies_outside_a_tensor_is_not_touched():
    buffer = torch.full((4 * 99 + 64,), float("nan"))
    x = buffer[32:-32].view(4, 99)
    x.copy_(torch.randn(4, 99, generator=torch.Generator().manual_seed(0)))
    one = torch.tensor(1.0)
    call = kernels.Call(rule=Rule(), num_steps=4, num_channels=1, static=False, width=one, amplitude=one, leak=None)
    out, _ = call.forward(x, None, None, None, None, False)
    grad, *_, counts = call.backward(torch.ones_like(x), None, x, None, None, None, None, True)
    assert not out.isnan().any()
    assert not grad.isnan().any()
    assert counts is not None
    assert counts[:2].tolist() == [4 * 99, out.sum()]
    assert buffer[:32].isnan().all()
    assert buffer[-32:].isnan().all()


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_packing_is_lossless(bits):
    x = torch.randint(0, 2**bits, (3, 8, 5, 7), generator=torch.Generator().manual_seed(0)).bfloat16()
    packed = packing.Packed(x, bits)
    assert packed.data is not None
    assert packed.data.numel() * 8 == x.numel() * bits
    assert torch.equal(packed.unpack(), x)


POOLS = [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 3, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", POOLS, ids=str)
@pytest.mark.parametrize("shape", [(6, 3, 9, 7), (2, 70, 5, 5), (1, 1, 3, 3)], ids=str)
def test_pooling_finds_torchs_maxima_and_gradients(shape, window, dtype):
    generator = torch.Generator().manual_seed(9)
    values = torch.randint(-2, 3, shape, generator=generator).to(dtype)  # windows with equal maxima, and below 0
    values[0, 0] = 0.0
    values[-1, -1, 0, 0] = float("nan")
    ours, theirs = (values.clone().requires_grad_() for _ in range(2))
    got = packing.max_pool2d(ours, nn.MaxPool2d(*window))
    wanted = functional.max_pool2d(theirs, *window)
    assert torch.equal(got.nan_to_num(7.0), wanted.nan_to_num(7.0))
    weights = torch.randint(-8, 9, wanted.shape, generator=generator).to(dtype)  # their sums are exact
    got.backward(weights)
    wanted.backward(weights)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)
    assert "SpikePool" in type(got.grad_fn).__name__
