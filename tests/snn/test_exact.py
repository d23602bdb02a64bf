"""Fused layers and networks against the equations in fp64, written here a second time."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.config import ModelConfig
from pipeline.snn.kernels import norm, reference
from pipeline.snn.kernels.reference import Rule
from pipeline.snn.networks import ms_resnet, sew_resnet
from tests.support.snn_twins import require_compiler

EPS = 2.0**-23
T, N, C, SIDE = 4, 8, 12, 15


def near_threshold(y: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """y (T N, C, H, W) with every third element of the first step moved to where BN in training makes it v_th = 1.

    Up to 8 ulp above or below it.
    """
    first = torch.zeros(y.shape, dtype=torch.bool)
    first[:N].view(-1)[::3] = True
    y, ulps = y.double(), torch.randint(-8, 9, y.shape, generator=torch.Generator().manual_seed(0))
    for _ in range(60):
        # Moving elements changes the statistics: repeat until they no longer change (it is a contraction).
        var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
        shift, scale, mean = (c[:, None, None] for c in (beta, gamma / (var + 1e-5).sqrt(), mean))
        y = torch.where(first, (1 + ulps * EPS - shift) / scale + mean, y)
    return y.float()


class _Forced(torch.autograd.Function):
    """Given spikes forward; the triangle of width 0.8 and amplitude 1.25 backward."""

    @staticmethod
    def forward(ctx, u, s):
        ctx.save_for_backward(u)
        return s.clone()

    @staticmethod
    def backward(ctx, *grads):
        (u,) = ctx.saved_tensors
        return grads[0] * 1.25 / 0.8 * (1 - u.abs() / 0.8).clamp_min(0), None


def exact(y, gamma, beta, spikes, rule):
    """In fp64: each step's h - v_th, given the spikes before it, and the spikes with their surrogate gradient."""
    x = functional.batch_norm(y, None, None, gamma, beta, True, 0.1, 1e-5).unflatten(0, (T, -1))
    v, distances, forced = torch.zeros_like(x[0]), [], []
    for x_t, s_t in zip(x, spikes.unflatten(0, (T, -1)).double(), strict=True):
        u = v + x_t - rule.v_th
        s = _Forced.apply(u, s_t)
        assert isinstance(s, torch.Tensor)
        reset = s if not rule.detach else s_t
        v = (u + rule.v_th) * (1 - reset) if rule.hard else u + rule.v_th - rule.v_th * reset
        distances.append(u)
        forced.append(s)
    return torch.cat(distances), torch.cat(forced)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("rule", [Rule(), Rule(hard=False)])
def test_a_fused_layer_errs_only_where_fp32_cannot_tell(rule, added):
    require_compiler()
    generator = torch.Generator().manual_seed(7)
    gamma, beta = torch.rand(C, generator=generator) + 0.5, torch.rand(C, generator=generator) * 0.5
    y = near_threshold(torch.randn(T * N, C, SIDE, SIDE, generator=generator), gamma.double(), beta.double())
    shortcut = torch.randint(0, 4, y.shape, generator=generator).float()
    weight = torch.randn(y.shape, generator=generator)
    bn = nn.BatchNorm2d(C)
    with torch.no_grad():
        bn.weight.copy_(gamma)
        bn.bias.copy_(beta)
    width, amplitude = torch.tensor(0.8), torch.tensor(1.25)
    y_, shortcut_ = y.clone().requires_grad_(), shortcut.clone().requires_grad_()
    out = norm.run(y_, bn, rule, width, amplitude, num_steps=T, shortcut=shortcut_ if added else None)
    (out * weight).sum().backward()
    spikes = out.detach() - shortcut if added else out.detach()
    plain = norm.run_reference(y, bn, rule, width, amplitude, num_steps=T).detach()

    wide = [tensor.double().requires_grad_() for tensor in (y, gamma, beta)]
    distances, forced = exact(wide[0], wide[1], wide[2], spikes, rule)
    near = distances.abs() <= 4 * EPS
    assert near[:N].sum() > N * C * SIDE * SIDE / 8
    assert torch.equal(spikes[~near] == 1, distances[~near] >= 0)
    # In the first step the fp32 definition has the same potentials to 4 ulp; later steps depend on earlier spikes.
    assert not ((spikes != plain) & ~near)[:N].any()

    (forced * weight).sum().backward()
    # Given the spikes, h errs by some ulp and g by that over w^2, relative to the largest gradient: 4 ulp a step.
    # Errors of the sums over a channel, of T N H W = 7200 such terms, are small compared with the terms.
    for got, tensor in zip((y_.grad, bn.weight.grad, bn.bias.grad), wide, strict=True):
        assert got is not None
        assert tensor.grad is not None
        error, largest = (got.double() - tensor.grad).abs().max(), tensor.grad.abs().max()
        assert error <= 4 * T * EPS * largest, (error / largest).item()
    if added:
        assert shortcut_.grad is not None
        assert torch.equal(shortcut_.grad, weight)


@pytest.mark.parametrize("kind", ["add", "and", "iand"])
def test_joined_paths_have_the_gradients_of_their_formula(kind):
    generator = torch.Generator().manual_seed(0)
    b, s = (torch.randint(0, 2, (3, 4), generator=generator).double().requires_grad_() for _ in range(2))
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    out = sew_resnet.connect(kind, b, s)
    (out * weight).sum().backward()
    firing, shortcut = b.detach().bool(), s.detach().bool()
    if kind == "add":
        wanted, grad_b, grad_s = firing.double() + shortcut, weight, weight
    elif kind == "and":
        wanted, grad_b, grad_s = (firing & shortcut).double(), weight * shortcut, weight * firing
    else:
        wanted, grad_b, grad_s = (~firing & shortcut).double(), -weight * shortcut, weight * ~firing
    assert torch.equal(out, wanted)
    assert b.grad is not None
    assert s.grad is not None
    assert torch.equal(b.grad, grad_b)
    assert torch.equal(s.grad, grad_s)


def plain_network(net: sew_resnet.SEWResNet, images: torch.Tensor, steps: int, kind: str) -> torch.Tensor:
    """The whole network in plain operations: nothing fused, packed or static, the current repeated T times."""
    parts, one = dict(net.named_parameters()), torch.ones((), dtype=images.dtype)

    def layer(x, conv, bn, stride, padding):
        y = functional.conv2d(x, parts[f"{conv}.weight"], None, stride, padding)
        y = functional.batch_norm(y, None, None, parts[f"{bn}.weight"], parts[f"{bn}.bias"], True, 0.1, 1e-5)
        return reference.run(y.unflatten(0, (steps, -1)), Rule(v_th=0.5), one, one)[0].flatten(0, 1)

    x = layer(images.repeat(steps, 1, 1, 1), "conv1", "bn1", 1, 1)
    for name, stride in (("layer1.0", 1), ("layer2.0", 2)):
        branch = layer(x, f"{name}.conv1", f"{name}.bn1", stride, 1)
        branch = layer(branch, f"{name}.conv2", f"{name}.bn2", 1, 1)
        if stride == 2:
            x = layer(x, f"{name}.downsample.0", f"{name}.downsample.1", 2, 0)
        x = {"add": branch + x, "and": branch * x, "iand": x - branch * x}[kind]
    logits = functional.linear(x.mean((2, 3)), parts["fc.weight"], parts["fc.bias"])
    return logits.unflatten(0, (steps, -1))


@pytest.mark.parametrize("kind", ["add", "and", "iand"])
def test_a_network_of_every_connection_is_its_plain_form_in_fp64(kind):
    torch.manual_seed(0)
    net = sew_resnet.build(ModelConfig(connect=kind, v_th=0.5, T=3), num_classes=5, image_size=16).double()
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    agree(net, lambda images: plain_network(net, images, 3, kind), images)


def agree(net: torch.nn.Module, plain: Callable, images: torch.Tensor) -> None:
    """The network and its plain form, in fp64: logits, and gradients of every parameter."""
    results = []
    for forward in (net, plain):
        net.zero_grad()
        logits = forward(images)
        logits.square().sum().backward()
        results.append((logits.detach(), {name: p.grad.clone() for name, p in net.named_parameters()}))  # pyright: ignore
    (logits, grads), (logits_, grads_) = results
    # A network that is silent somewhere would agree for the wrong reason.
    assert all(grad.abs().max() > 0 for grad in grads_.values())
    torch.testing.assert_close(logits, logits_, rtol=1e-9, atol=1e-12)
    for name, grad in grads_.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-9 * grad.abs().max().item(), msg=name)


def plain_membrane_network(net: ms_resnet.MSResNet, images: torch.Tensor, steps: int) -> torch.Tensor:
    """MS-ResNet by the equations at the top of its file, in plain operations as `plain_network` is."""
    parts, one = dict(net.named_parameters()), torch.ones((), dtype=images.dtype)

    def current(x, conv, bn, stride, padding):
        y = functional.conv2d(x, parts[f"{conv}.weight"], None, stride, padding)
        return functional.batch_norm(y, None, None, parts[f"{bn}.weight"], parts[f"{bn}.bias"], True, 0.1, 1e-5)

    def spikes(x, neuron):
        rule = Rule(v_th=0.5, leaky=True, hard=False)
        leak = parts[f"{neuron}.w"].sigmoid()[0]
        return reference.run(x.unflatten(0, (steps, -1)), rule, one, one, leak=leak)[0].flatten(0, 1)

    x = current(images.flatten(0, 1) if images.dim() == 5 else images.repeat(steps, 1, 1, 1), "conv1", "bn1", 1, 1)
    for name, stride in (("layer1.0", 1), ("layer2.0", 2)):
        branch = current(spikes(x, f"{name}.sn1"), f"{name}.conv1", f"{name}.bn1", stride, 1)
        branch = current(spikes(branch, f"{name}.sn2"), f"{name}.conv2", f"{name}.bn2", 1, 1)
        if stride == 2:
            x = current(x, f"{name}.downsample.0", f"{name}.downsample.1", 2, 0)
        x = branch + x
    logits = functional.linear(spikes(x, "sn_out").mean((2, 3)), parts["fc.weight"], parts["fc.bias"])
    return logits.unflatten(0, (steps, -1))


@pytest.mark.parametrize("shape", [(4, 3, 16, 16), (5, 2, 3, 16, 16)])
def test_a_network_of_membrane_shortcuts_is_its_plain_form_in_fp64(shape):
    torch.manual_seed(0)
    model = ModelConfig(arch="ms_tiny", v_th=0.5, T=3, neuron="plif", reset="soft")
    net = ms_resnet.build(model, num_classes=5, image_size=16).double()
    images, steps = torch.randn(shape, dtype=torch.float64), 3 if len(shape) == 4 else shape[0]
    agree(net, lambda images: plain_membrane_network(net, images, steps), images)


@pytest.mark.parametrize("kind", ["add", "and", "iand"])
def test_a_block_of_every_connection_joins_the_spikes_of_its_twins(kind):
    require_compiler()
    torch.manual_seed(0)
    net = sew_resnet.build(ModelConfig(connect=kind, v_th=0.5, T=3), num_classes=5, image_size=16)
    block = net.blocks()[0][1]
    x = (torch.rand(6, 16, 8, 8) < 0.4).float().requires_grad_()
    out = block(x, 3)
    weight = torch.randn(out.shape)
    (out * weight).sum().backward()
    grads = {name: p.grad.double() for name, p in block.named_parameters() if p.grad is not None}
    assert len(grads) == 6
    sides = [x.grad, out]
    wide = sew_resnet.build(ModelConfig(connect=kind, v_th=0.5, T=3), num_classes=5, image_size=16)
    wide.load_state_dict(net.state_dict())
    block = wide.double().blocks()[0][1]
    x = x.detach().double().requires_grad_()
    out = block(x, 3)
    (out * weight).sum().backward()
    # No potential of this seed lies so near to v_th that fp32 takes another side.
    assert torch.equal(sides[1].double(), out)
    assert sides[0] is not None
    assert x.grad is not None
    for got, wanted in [(sides[0].double(), x.grad), *((grads[n], p.grad) for n, p in block.named_parameters())]:
        # A channel's sums have 384 terms with some ulp of error each, through two layers.
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
