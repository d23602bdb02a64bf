"""Weights to and from the public SEW-ResNet codes, and safetensors files.

Three layouts hold the same tensors under different names:

    ours, SpikingJelly 2   layer1.0.conv1.weight            layer1.0.bn1.weight            layer2.0.downsample.0.weight
    original               layer1.0.conv1.module.0.weight   layer1.0.conv1.module.1.weight
                           layer2.0.downsample.0.module.0.weight

(earlier releases of the original have no `.module`; both are read). The original averages its logits over time inside
the network, which changes no tensor. SpikingJelly's MS-ResNet has other names at its ends, and these are read too:

    conv1.weight, bn1.weight, fc.weight, sn_out.w       stem.0.weight, stem.1.weight, head.weight, head_lif.w
    layer1.0.sn1.w                                      layer1.0.spike1.w
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

_BRANCH = re.compile(r"^(layer\d+\.\d+)\.conv(\d)\.(?:module\.)?([01])\.(.+)$")
_SHORTCUT = re.compile(r"^(layer\d+\.\d+)\.downsample\.0\.(?:module\.)?([01])\.(.+)$")
_MS_RESNET = {"stem.0": "conv1", "stem.1": "bn1", "head": "fc", "head_lif": "sn_out"}
_MS_NEURON = re.compile(r"^(layer\d+\.\d+)\.spike(\d)$")
_OUR_BRANCH = re.compile(r"^(layer\d+\.\d+)\.(conv|bn)(\d)\.(.+)$")
_OUR_SHORTCUT = re.compile(r"^(layer\d+\.\d+)\.downsample\.([01])\.(.+)$")


def from_original(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The original SEW-ResNet code's or SpikingJelly's state dict under our names; ours passes unchanged."""
    return {_our_name(name): tensor for name, tensor in weights.items()}


def as_in(ours: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`weights`, in any layout, under the names of the network whose state dict is `ours`."""
    given = weights if weights.keys() == ours.keys() else from_original(weights)
    # A learned tau is a scalar in the other layouts.
    taus = {name for name, tensor in given.items() if name in ours and (tensor.shape, ours[name].shape) == ((), (1,))}
    return {name: tensor.reshape(1) if name in taus else tensor for name, tensor in given.items()}


def _our_name(name: str) -> str:
    if branch := _BRANCH.match(name):
        block, index, part, rest = branch.groups()
        return f"{block}.{('conv', 'bn')[int(part)]}{index}.{rest}"
    if shortcut := _SHORTCUT.match(name):
        block, part, rest = shortcut.groups()
        return f"{block}.downsample.{part}.{rest}"
    module, dot, kind = name.rpartition(".")
    return _MS_NEURON.sub(r"\1.sn\2", _MS_RESNET.get(module, module)) + dot + kind


def to_original(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict under the names of the original SEW-ResNet code."""
    renamed = {}
    for name, tensor in weights.items():
        branch, shortcut = _OUR_BRANCH.match(name), _OUR_SHORTCUT.match(name)
        if branch:
            block, kind, index, rest = branch.groups()
            name = f"{block}.conv{index}.module.{('conv', 'bn').index(kind)}.{rest}"
        elif shortcut:
            block, part, rest = shortcut.groups()
            name = f"{block}.downsample.0.module.{part}.{rest}"
        renamed[name] = tensor
    return renamed


def load(network: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Load a state dict in any of the three layouts; every tensor must fit.

    Raises:
        ValueError: a tensor is missing, left over or of another shape; the message names the first of each.
    """
    ours = network.state_dict()
    given = as_in(ours, weights)
    missing = [name for name in ours if name not in given]
    extra = [name for name in given if name not in ours]
    shapes = [name for name in ours if name in given and ours[name].shape != given[name].shape]
    if missing or extra or shapes:
        said = [f"missing {missing[0]} and {len(missing) - 1} more"] if missing else []
        said += [f"unknown {extra[0]} and {len(extra) - 1} more"] if extra else []
        said += [f"{n} is {tuple(given[n].shape)} and not {tuple(ours[n].shape)}" for n in shapes[:1]]
        raise ValueError(f"these weights do not fit the network: {'; '.join(said)}; check model.arch and num_classes")
    network.load_state_dict(given)


def save_safetensors(
    network: nn.Module,
    path: str | os.PathLike,
    *,
    metadata: Mapping[str, str] | None = None,
    original: bool = False,
) -> None:
    """Write the network's weights and BN statistics to a safetensors file.

    Args:
        network: whose weights are saved.
        path: the file; an existing one is replaced.
        metadata: entries for the header of the file, beside the format.
        original: use the names of the original SEW-ResNet code instead of ours.
    """
    from safetensors.torch import save

    weights = to_original(network.state_dict()) if original else network.state_dict()
    copies = {name: tensor.detach().contiguous().clone() for name, tensor in weights.items()}
    # Not by save_file, whose files only their owner may read.
    Path(path).write_bytes(save(copies, metadata={"format": "pt", **(metadata or {})}))


def load_safetensors(network: nn.Module, path: str | os.PathLike) -> None:
    """Read a file of `save_safetensors`, or one in another of the three layouts; raises as `load` does."""
    from safetensors.torch import load_file

    load(network, load_file(path))
