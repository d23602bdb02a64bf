"""Weights of other runs and codes as a start: what is read, what matched, and what is refused."""

import argparse
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline import checkpoint_files, init_from
from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.snn import sew_resnet, state_dicts


def network(num_classes: int = 10, seed: int = 0, **model) -> sew_resnet.SEWResNet:
    torch.manual_seed(seed)
    net = sew_resnet.build(ModelConfig(**model), num_classes=num_classes, image_size=16)
    for module in net.modules():  # no statistic is what a fresh network has
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.normal_()
    return net


def written(form: str, net: nn.Module, folder: Path) -> Path:
    """`net`'s weights in one of the forms that people have them in."""
    weights, path = net.state_dict(), folder / "weights.pt"
    if form == "safetensors":
        path = folder / "weights.safetensors"
        state_dicts.save_safetensors(net, path)
    elif form == "original":
        original = state_dicts.to_original(weights)
        torch.save({"model": original, "epoch": 319, "args": argparse.Namespace(T=4)}, path)
    elif form == "data parallel":
        torch.save({f"module.{name}": tensor for name, tensor in weights.items()}, path)
    else:
        parts = {"parameters": dict(net.named_parameters()), "buffers": dict(net.named_buffers())}
        step = checkpoint_files.save(folder, 7, {"step": 7, "model": {**parts, "optimizer": {}, "updates": {}}})
        path = {"run": folder, "checkpoint": step, "state": step / "state.pt"}[form]
    return path


@pytest.mark.parametrize("form", ["safetensors", "original", "data parallel", "run", "checkpoint", "state"])
def test_weights_are_read_from_every_form(form, tmp_path):
    theirs, ours = network(seed=1), network(seed=2)
    path = written(form, theirs, tmp_path)
    said = init_from.load(ours, str(path))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    total = len(ours.state_dict())
    assert said == f"init_from: {total} of {total} tensors from {path}"


def test_another_number_of_classes_starts_the_classifier_anew_and_says_so(tmp_path):
    theirs, ours = network(seed=1), network(num_classes=3, seed=2)
    fresh = ours.fc.weight.detach().clone()
    said = init_from.load(ours, str(written("safetensors", theirs, tmp_path)))
    assert torch.equal(ours.fc.weight, fresh)
    assert torch.equal(ours.conv1.weight, theirs.conv1.weight)
    total = len(ours.state_dict())
    assert f"{total - 2} of {total} tensors" in said
    assert said.endswith("; the classifier starts anew, from 10 classes to 3")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"arch": "sew_cifar8"}, r"missing layer3\.\S+ and \d+ more; fc.weight is \(10, 32\) and not \(10, 64\)"),
        ({"neuron": "plif"}, r"missing sn1\.w and \d+ more"),
    ],
)
def test_another_network_is_refused_with_what_does_not_fit(model, message, tmp_path):
    path = written("safetensors", network(), tmp_path)
    with pytest.raises(ConfigError, match=message) as refusal:
        init_from.load(network(**model), str(path))
    assert str(refusal.value).startswith(f"init_from={str(path)!r}: these weights do not fit the network")


@pytest.mark.parametrize("name", ["absent.pt", "absent.safetensors", "garbage.pt", "garbage.safetensors", "empty.pt"])
def test_a_file_that_is_none_is_refused(name, tmp_path):
    if not name.startswith("absent"):
        (tmp_path / name).write_bytes(b"" if name.startswith("empty") else b"no weights at all, only words")
    with pytest.raises(ConfigError, match=rf"init_from='.*{re.escape(name)}' cannot be read \(.+\)"):
        init_from.load(network(), str(tmp_path / name))


def test_what_holds_no_weights_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no whole checkpoint; name a run's folder or a file"):
        init_from.load(network(), str(tmp_path))
    torch.save({"epoch": 3}, tmp_path / "notes.pt")
    with pytest.raises(ConfigError, match="holds no tensors by name; use a state dict"):
        init_from.load(network(), str(tmp_path / "notes.pt"))
