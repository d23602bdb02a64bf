"""Weights of other runs and codes as a start, and a run's widths: what is read, what matched, and what is refused."""

import argparse
import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from launch.options import parse
from pipeline.chi.controller import start
from pipeline.config import Config, ModelConfig
from pipeline.engine import init_from
from pipeline.errors import ConfigError
from pipeline.run_dir import checkpoint_files
from pipeline.snn import state_dicts
from pipeline.snn.networks import sew_resnet
from pipeline.snn.networks.network import Network


def network(num_classes: int = 10, seed: int = 0, **model) -> sew_resnet.SEWResNet:
    torch.manual_seed(seed)
    net = sew_resnet.build(ModelConfig(**model), num_classes=num_classes, image_size=16)
    for module in net.modules():  # no statistic has the value of a fresh network
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.normal_()
    return net


def config(path: object, **model) -> Config:
    """Of a run that starts from `path`."""
    digits = parse(["--recipe", "digits", "--init-from", str(path), "--chi.calibrate", "false"])
    return dataclasses.replace(digits, model=dataclasses.replace(digits.model, **model))


def calibrated(of: Config) -> Config:
    return dataclasses.replace(of, chi=dataclasses.replace(of.chi, calibrate=True))


WIDTHS = torch.tensor([0.25, 0.5, 1.0, 1.5, 2.0, 4.0])


def written(form: str, net: nn.Module, folder: Path, widths: torch.Tensor | None = None) -> Path:
    """`net`'s weights in one of the forms that people use."""
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
        state = {"step": 7, "model": {**parts, "optimizer": {}, "updates": {}}}
        if widths is not None:
            state |= {"widths": start(widths).state_dict(), "config": config("").to_dict()}
        step = checkpoint_files.save(folder, 7, state)
        path = {"run": folder, "checkpoint": step, "state": step / "state.pt"}[form]
    return path


@pytest.mark.parametrize("form", ["safetensors", "original", "data parallel", "run", "checkpoint", "state"])
def test_weights_are_read_from_every_form(form, tmp_path):
    theirs, ours = network(seed=1), network(seed=2)
    path = written(form, theirs, tmp_path)
    said, widths = init_from.load(ours, config(path))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    total = len(ours.state_dict())
    assert said == (
        f"init_from: {total} of {total} tensors from {path}; widths start from model.width=1, since it holds weights "
        "alone"
    )
    assert widths is None


@pytest.mark.parametrize("form", ["run", "checkpoint", "state"])
def test_a_run_of_the_same_layers_gives_its_widths_and_says_so(form, tmp_path):
    path = written(form, network(seed=1), tmp_path, WIDTHS)
    said, widths = init_from.load(network(seed=2), config(path))
    assert said.endswith(f"tensors from {path}; widths 0.25 to 4, with which that run ended")
    assert widths is not None
    torch.testing.assert_close(widths.float(), WIDTHS)
    again, widths = init_from.load(network(seed=2), calibrated(config(path)))
    assert again == f"{said}, and chi.calibrate is left out"
    assert widths is not None


@pytest.mark.parametrize(
    ("widths", "model", "why"),
    [
        (WIDTHS[:5], {}, "that run has 5 spiking layers and not 6"),
        (WIDTHS, {"width": 2.0}, "model.width was 1.0 in that run and is 2.0"),
        (WIDTHS, {"surrogate": "rectangle"}, "model.surrogate was 'triangle' in that run and is 'rectangle'"),
        (WIDTHS * torch.nan, {}, "those of that run are not finite"),
        (WIDTHS * 0, {}, "those of that run are not finite"),
    ],
)
def test_widths_that_mean_something_else_are_not_taken_and_that_is_said(widths, model, why, tmp_path):
    path = written("run", network(seed=1), tmp_path, widths)
    said, taken = init_from.load(network(seed=2), config(path, **model))
    assert taken is None
    assert said.endswith(f"; widths start from model.width={model.get('width', 1):g}, since {why}")
    said, _ = init_from.load(network(seed=2), calibrated(config(path, **model)))
    assert said.endswith(f"; widths start from chi.calibrate, since {why}")


def test_another_number_of_classes_starts_the_classifier_anew_and_says_so(tmp_path):
    theirs, ours = network(seed=1), network(num_classes=3, seed=2)
    fresh = ours.fc.weight.detach().clone()
    said, _ = init_from.load(ours, config(written("safetensors", theirs, tmp_path)))
    assert torch.equal(ours.fc.weight, fresh)
    assert torch.equal(ours.conv1.weight, theirs.conv1.weight)
    total = len(ours.state_dict())
    assert f"{total - 2} of {total} tensors" in said
    assert "; the classifier starts anew, from 10 classes to 3; widths start from " in said


def test_a_table_of_another_size_is_no_classifier(tmp_path):
    class Tokens(Network):
        def __init__(self, tokens: int) -> None:
            super().__init__()
            self.positions = torch.nn.Parameter(torch.zeros(tokens, 8))
            self.fc = torch.nn.Linear(8, 10)

        def spiking_layers(self) -> list:
            return []

    path = written("safetensors", Tokens(16), tmp_path)
    with pytest.raises(ConfigError, match=r"positions is \(16, 8\) and not \(64, 8\)"):
        init_from.load(Tokens(64), config(path))


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
        init_from.load(network(**model), config(path))
    assert str(refusal.value).startswith(f"init_from={str(path)!r}: these weights do not fit the network")


@pytest.mark.parametrize("name", ["absent.pt", "absent.safetensors", "garbage.pt", "garbage.safetensors", "empty.pt"])
def test_a_file_that_is_none_is_refused(name, tmp_path):
    if not name.startswith("absent"):
        (tmp_path / name).write_bytes(b"" if name.startswith("empty") else b"no weights at all, only words")
    with pytest.raises(ConfigError, match=rf"init_from='.*{re.escape(name)}' cannot be read \(.+\)"):
        init_from.load(network(), config(tmp_path / name))


def test_what_holds_no_weights_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no whole checkpoint; name a run's folder or a file"):
        init_from.load(network(), config(tmp_path))
    torch.save({"epoch": 3}, tmp_path / "notes.pt")
    with pytest.raises(ConfigError, match="holds no tensors by name; use a state dict"):
        init_from.load(network(), config(tmp_path / "notes.pt"))
