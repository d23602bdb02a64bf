"""The networks: shapes, names, weights in and out, losses, energy, learning."""

import os
import re
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from pipeline.config import ModelConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.snn import energy, losses, neurons, state_dicts
from pipeline.snn.networks import sew_resnet
from pipeline.snn.networks.archs import ARCHS
from pipeline.snn.networks.build import build as build_network


def build(arch: str = "sew_tiny", size: int = 16, **fields) -> Any:
    torch.manual_seed(0)
    return build_network(ModelConfig(arch=arch, **fields), num_classes=5, image_size=size)


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch not in ("sew_resnet101", "sew_resnet152")])
def test_every_network_trains_on_images_and_on_event_frames(arch):
    net = build(arch, 32, T=2)
    layers = net.spiking_layers()
    state = neurons.bind(net)
    for images in (torch.randn(2, 3, 32, 32), torch.randn(2, 2, 3, 32, 32)):
        logits = net(images)
        assert logits.shape == (2, 2, 5)
    losses.cross_entropy(logits, torch.tensor([0, 1])).backward()
    modules = dict(net.named_modules())
    assert [layer.name for layer in layers] == list(state.names)
    assert all(modules[layer.name] is layer.neuron for layer in layers)
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert len({id(layer.weight) for layer in layers}) == len(layers)
    fed = {id(layer.weight) for layer in layers}
    rest = [name for name, p in net.named_parameters() if p.dim() == 4 and id(p) not in fed]
    # A shortcut of membrane currents has no neurons of its own.
    assert rest == [
        f"{name}.downsample.0.weight" for name, block in net.blocks() if arch[:2] == "ms" and block.downsample
    ]


@pytest.mark.parametrize(("arch", "layers", "millions"), [("sew_resnet101", 104, 42.6), ("sew_resnet152", 155, 58.3)])
def test_the_deepest_networks_have_their_published_size(arch, layers, millions):
    with torch.device("meta"):
        net = sew_resnet.SEWResNet(ModelConfig(arch=arch), num_classes=1000)
    # A neuron for each convolution of torchvision's ResNet of that depth, and as many parameters (44.5 and 60.2 M).
    assert len(net.spiking_layers()) == layers
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions + 1.95, abs=0.1)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"model\.arch='vgg' is not allowed; use one of sew_tiny, .*sew_resnet152"):
        build("vgg")
    with pytest.raises(ConfigError, match=r"data\.image_size=16 is too small for model\.arch='sew_resnet18'; use 32"):
        build("sew_resnet18")
    with pytest.raises(ConfigError, match=r"data\.image_size=3 is too small for model\.arch='ms_cifar8'; use 4"):
        build("ms_cifar8", 3)
    with pytest.raises(ValueError, match=re.escape("images of shape (2, 1, 16, 16) are not allowed; use (N, 3, H, W)")):
        build()(torch.zeros(2, 1, 16, 16))


def test_a_plain_network_is_its_layers_in_a_row():
    net = build("sew_cifar14", connect="none")
    layers = net.spiking_layers()
    assert [layer.name for layer in layers][-2:] == ["layer3.1.sn1", "layer3.1.sn2"]
    assert len(layers) == 13, "the stem and two a block: no layer is for a shortcut"
    images = torch.randn(2, 3, 16, 16)
    x = images.repeat(net.T, 1, 1, 1)
    for layer in layers:
        name = layer.name.replace("sn", "{}")
        conv, bn = (net.get_submodule(name.format(kind)) for kind in ("conv", "bn"))
        spikes = layer.neuron(bn(conv(x)).unflatten(0, (net.T, -1)))
        x = spikes.flatten(0, 1)
    expected = net.fc(net.avgpool(x).flatten(1)).unflatten(0, (net.T, -1))
    assert torch.allclose(net(images), expected, atol=1e-5)
    with pytest.raises(ConfigError, match="zero_init_residual"):
        ModelConfig(connect="none", zero_init_residual=True).check()


def through_blocks(net) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of each block whose shortcut is its input, for two random images."""
    seen = []
    for _, block in net.blocks():
        if block.downsample is None:
            block.register_forward_hook(lambda _m, inputs, out: seen.append((inputs[0], out)))
    with torch.no_grad():
        net(torch.randn(2, 3, 16, 16))
    return seen


@pytest.mark.parametrize("connect", ["add", "and", "iand"])
def test_zero_initialised_blocks_are_their_shortcuts(connect):
    net = build("sew_cifar20", connect=connect, zero_init_residual=True, v_th=0.5).eval()
    seen = through_blocks(net)
    assert len(seen) == 7
    assert all(torch.equal(before, after) for before, after in seen)
    assert seen[0][0].sum() > 0


def test_membrane_blocks_start_as_their_shortcuts_and_at_the_size_of_the_threshold():
    net = build("ms_cifar20", zero_init_residual=True, v_th=0.5, neuron="lif", tau=1.5)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    silent = [block.bn2 for _, block in net.blocks()]
    assert all((bn.weight == (0 if bn in silent else 0.75)).all() for bn in norms)
    seen = through_blocks(net)
    assert len(seen) == 7
    assert seen[0][1].shape == (8, 16, 16, 16), "the currents of the stem, the same at every step"
    assert all(torch.equal(before.repeat(len(after) // len(before), 1, 1, 1), after) for before, after in seen)


def test_only_its_own_connection_is_allowed_to_a_membrane_shortcut():
    with pytest.raises(
        ConfigError, match=r"model\.connect='iand' is not allowed with .*'ms_tiny'.*; use add, or a sew"
    ):
        build("ms_tiny", connect="iand")


def test_a_family_refuses_the_names_of_the_other():
    with pytest.raises(ConfigError, match=r"model\.arch='ms_tiny' is not allowed; use one of sew_tiny"):
        sew_resnet.build(ModelConfig(arch="ms_tiny"), num_classes=5, image_size=16)


def test_learned_time_constants_get_their_gradient_in_every_form():
    x = torch.randn(4, 2, 8, 6, 6, generator=torch.Generator().manual_seed(0)) + 0.5
    grads = []
    for dtype in (torch.float32, torch.float64):
        neuron = neurons.Neuron(neurons.Rule(leaky=True), tau=2.5, learn_tau=True).to(dtype)
        neuron(x.to(dtype)).square().sum().backward()
        assert neuron.w is not None
        assert neuron.w.sigmoid().item() == pytest.approx(1 / 2.5, rel=1e-6)
        grads.append(neuron.w.grad.item())  # pyright: ignore[reportOptionalMemberAccess]
    # fp64 runs the reference, fp32 the twin: a sum of 2304 terms, and no potential of this seed near v_th.
    assert grads[0] == pytest.approx(grads[1], rel=1e-4)
    assert grads[0] != 0


def test_rms_amplitudes_hold_the_mean_square_while_widths_move():
    net = nn.Sequential(neurons.Neuron(neurons.Rule(scale="rms"), width=2.0), neurons.Neuron(neurons.Rule()))
    state = neurons.bind(net)
    x = torch.randn(4, 4000, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def mean_square() -> float:
        state.zero_counts()
        net(x).sum().backward()
        return state.grad_sq[0].item() / state.neuron_steps[0].item()

    first = mean_square()
    state.hold_rms(state.grad_sq, state.neuron_steps)
    state.widths.fill_(0.25)
    assert mean_square() > 3 * first
    state.hold_rms(state.grad_sq, state.neuron_steps)
    # The first layer's currents are fixed, so its new amplitude is exact up to rounding.
    assert mean_square() == pytest.approx(first, rel=1e-4)
    assert state.amplitudes[1] == 1


def test_weights_go_to_the_original_names_and_back():
    net, other = build("sew_resnet18", 32), build("sew_resnet18", 32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    original = state_dicts.to_original(net.state_dict())
    for name in ("layer1.0.conv1.module.0.weight", "layer1.0.conv1.module.1.running_mean", "fc.weight"):
        assert name in original
    assert "layer2.0.downsample.0.module.1.weight" in original
    state_dicts.load(other, original)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))
    early = {name.replace(".module.", "."): tensor for name, tensor in original.items()}
    state_dicts.load(other, early)
    early.pop("fc.bias")
    with pytest.raises(ValueError, match=r"missing fc\.bias and 0 more.*check model\.arch"):
        state_dicts.load(other, early)


def test_a_scalar_time_constant_of_the_peer_is_read():
    net = build(neuron="plif")
    weights = {name: t.reshape(()) if name.endswith(".w") else t for name, t in net.state_dict().items()}
    weights["sn1.w"] = torch.tensor(0.75)
    state_dicts.load(net, weights)
    assert net.sn1.w is not None
    assert net.sn1.w.item() == 0.75


def test_the_peers_names_of_membrane_networks_are_read_and_a_networks_own_stay():
    net, other = build("ms_tiny", neuron="plif"), build("ms_tiny", neuron="plif")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    ends = {"conv1": "stem.0", "bn1": "stem.1", "fc": "head", "sn_out": "head_lif"}
    theirs = {}
    for name, tensor in net.state_dict().items():
        module, _, kind = name.rpartition(".")
        theirs[f"{ends.get(module, module)}.{kind}".replace(".0.sn", ".0.spike")] = tensor
    assert {"stem.1.running_var", "layer1.0.spike2.w", "head.bias"} <= theirs.keys()
    state_dicts.load(other, theirs)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))
    mine = nn.ModuleDict({"stem": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "head": nn.Linear(2, 2)})
    state_dicts.load(mine, {name: tensor + 1 for name, tensor in mine.state_dict().items()})


@pytest.mark.parametrize("neuron", ["if", "plif"])
@pytest.mark.parametrize("arch", ["sew_tiny", "ms_tiny"])
def test_every_parameter_can_be_sent_as_bytes(neuron, arch):
    # DeepSpeed broadcasts parameters through such a view at its start.
    for name, parameter in build(arch, neuron=neuron).named_parameters():
        assert parameter.data.view(torch.uint8).numel() == 4 * parameter.numel(), name


def test_safetensors_files_round_trip(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    net, other = build(), build()
    with torch.no_grad():
        net.conv1.weight.mul_(2)
    before = os.umask(0o027)
    try:
        state_dicts.save_safetensors(net, tmp_path / "net.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "net.safetensors").stat().st_mode & 0o777 == 0o640
    state_dicts.load_safetensors(other, tmp_path / "net.safetensors")
    assert torch.equal(net.conv1.weight, other.conv1.weight)


@pytest.mark.parametrize("arch", ["sew_tiny", "ms_tiny"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_exported_network_gives_the_same_logits(dtype, arch):
    net = build(arch).eval().to(dtype)
    images = torch.randn(2, 3, 16, 16, dtype=dtype, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        program = torch.export.export(net, (images,))
        # fp32 runs the twin outside the export: equal up to rounding, and no potential of this seed is near v_th.
        torch.testing.assert_close(program.module()(images), net(images), rtol=1e-5, atol=1e-5)


def test_losses_match_their_formulas():
    logits = torch.randn(3, 4, 5, dtype=torch.float64)
    labels = torch.tensor([0, 4, 2, 1])
    by_hand = [-torch.log_softmax(logits[t], -1)[range(4), labels].mean() for t in range(3)]
    wanted = 0.9 * sum(by_hand) / 3 + 0.1 * ((logits - 1) ** 2).mean()
    assert losses.tet(logits, labels, lam=0.1).item() == pytest.approx(float(wanted), rel=1e-12)
    mean = -torch.log_softmax(logits.mean(0), -1)[range(4), labels].mean()
    assert losses.cross_entropy(logits, labels).item() == pytest.approx(float(mean), rel=1e-12)
    assert losses.cross_entropy(logits.bfloat16(), labels).dtype == torch.float32
    targets = 0.8 * nn.functional.one_hot(labels, 5).double() + 0.2 / 5
    smooth_ce = -(targets * torch.log_softmax(logits.mean(0), -1)).sum(-1).mean().item()
    smooth_tet = -(targets * torch.log_softmax(logits, -1)).sum(-1).mean().item()
    ce, tet = TrainConfig(label_smoothing=0.2), TrainConfig(label_smoothing=0.2, loss="tet", tet_lambda=0.0)
    assert losses.loss(ce, logits, labels).item() == pytest.approx(smooth_ce, rel=1e-12)
    assert losses.loss(tet, logits, labels).item() == pytest.approx(smooth_tet, rel=1e-12)
    pulled = losses.loss(TrainConfig(loss="tet", tet_lambda=0.1), logits, labels)
    assert pulled.item() == pytest.approx(float(wanted), rel=1e-12)
    with pytest.raises(ValueError, match=r"lam=2 is not allowed; use a number in \[0, 1\]"):
        losses.tet(logits, labels, lam=2)


@pytest.mark.parametrize("loss", ["ce", "tet"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_mixed_labels_is_the_mixed_loss_of_both(loss, smoothing):
    train = TrainConfig(loss=loss, tet_lambda=0.1, label_smoothing=smoothing)
    logits = torch.randn(3, 4, 5, dtype=torch.float64)
    ours, partners, share = torch.tensor([0, 4, 2, 1]), torch.tensor([1, 4, 3, 0]), 0.7
    one_hot = [nn.functional.one_hot(labels, 5).double() for labels in (ours, partners)]
    mixed = losses.loss(train, logits, share * one_hot[0] + (1 - share) * one_hot[1])
    pair = [losses.loss(train, logits, labels) for labels in (ours, partners)]
    assert mixed.item() == pytest.approx((share * pair[0] + (1 - share) * pair[1]).item(), rel=1e-12)
    shares = (share * one_hot[0] + (1 - share) * one_hot[1]).float()  # as the loader gives them, whatever the precision
    assert losses.loss(train, logits, shares).item() == pytest.approx(mixed.item(), rel=1e-6)
    assert losses.loss(train, logits.bfloat16(), shares).dtype == torch.float32


@pytest.mark.parametrize(("arch", "analog"), [("sew_tiny", {"conv1"}), ("ms_tiny", {"conv1", "layer2.0.downsample.0"})])
def test_energy_counts_every_connection_of_every_spike(arch, analog):
    net = build(arch, T=2, v_th=0.3)
    images = torch.randn(3, 3, 16, 16)
    seen = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda m, i, name=name: seen.__setitem__(name, (m, i[0])))
    measured = energy.measure(net, images)
    by_name = {layer.name: layer for layer in measured.layers}
    # Connections by brute force: a convolution of ones with ones adds 1 for each input-output pair.
    for name, (conv, x) in seen.items():
        ones = nn.functional.conv2d(
            x if name not in analog else torch.ones_like(x),
            torch.ones_like(conv.weight),
            None,
            conv.stride,
            conv.padding,
        )
        wanted = ones.double().sum().item() / 3
        got = by_name[name]
        assert (got.macs if name in analog else got.acs) == pytest.approx(wanted, rel=1e-6)
        assert (got.acs if name in analog else got.macs) == 0
    assert by_name["layer1.0.conv1"].acs > 0
    total = sum(4.6e-6 * layer.macs + 0.9e-6 * layer.acs for layer in measured.layers)
    assert measured.microjoule == pytest.approx(total)
    assert set(measured.firing_rates) == {layer.name for layer in net.spiking_layers()}
    assert 0 < measured.firing_rates["layer1.0.sn1"] < 1
    assert net.training


@pytest.mark.faults
@pytest.mark.parametrize("arch", ["sew_tiny", "ms_tiny"])
def test_the_small_network_learns_the_digits(arch):
    pixels, target = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    images = nn.functional.interpolate(images, size=16, mode="bilinear").expand(-1, 3, -1, -1)
    labels = torch.tensor(target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    torch.manual_seed(0)
    net = build_network(ModelConfig(arch=arch), num_classes=10, image_size=16)
    epochs, batch = 10, 32
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (1437 // batch))
    for _ in range(epochs):
        for chosen in train[torch.randperm(1437)].split(batch)[: 1437 // batch]:
            optimizer.zero_grad()
            losses.cross_entropy(net(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        accuracy = (net(images[test]).mean(0).argmax(1) == labels[test]).float().mean().item()
    # 20 epochs reach 98 %; half of that is enough to tell a network that learns from one that does not.
    assert accuracy >= 0.94
