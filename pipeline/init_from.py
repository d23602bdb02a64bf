"""Weights of another run or of the public codes as the start of a run, for fine-tuning.

What is read: a run's folder or one of its checkpoints, a safetensors file, or a file of torch.save (the original
SEW-ResNet code's among them, with its weights under "model"). Names may be in any layout of snn/state_dicts.py. Every
tensor has to fit, but for the classifier's, which starts anew where the number of classes differs.
"""

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pipeline import checkpoint_files
from pipeline.errors import ConfigError
from pipeline.snn import state_dicts
from pipeline.snn.sew_resnet import SEWResNet

CLASSIFIER = ("fc.weight", "fc.bias")


def load(network: SEWResNet, path: str) -> str:
    """Puts the weights at `path` into `network`; what matched, in a line.

    Raises:
        ConfigError: nothing readable there, or a tensor is missing, left over or of another shape.
    """
    weights = state_dicts.from_original(read(path))
    ours = network.state_dict()
    anew = all(name in weights for name in CLASSIFIER) and (
        weights["fc.weight"].shape[1:] == ours["fc.weight"].shape[1:]
        and weights["fc.weight"].shape[0] != ours["fc.weight"].shape[0]
    )
    num_classes = len(weights["fc.bias"]) if anew else 0
    if anew:
        weights |= {name: ours[name] for name in CLASSIFIER}
    try:
        state_dicts.load(network, weights)
    except ValueError as error:
        raise ConfigError(f"init_from={path!r}: {error}") from None
    matched = len(ours) - (len(CLASSIFIER) if anew else 0)
    said = f"init_from: {matched} of {len(ours)} tensors from {path}"
    if anew:
        said += f"; the classifier starts anew, from {num_classes} classes to {len(ours['fc.bias'])}"
    return said


def read(path: str) -> dict[str, torch.Tensor]:
    """The state dict at `path`, on the CPU, whatever it is wrapped in."""
    try:
        if Path(path).is_dir():
            saved = checkpoint_files.load(Path(path)) if (Path(path) / "state.pt").exists() else None
            saved = saved or checkpoint_files.load_newest(Path(path))
            if saved is None:
                raise ConfigError(f"init_from={path!r} holds no whole checkpoint; name a run's folder or a file")
        elif path.endswith(".safetensors"):
            return load_file(path)
        else:
            # The original code saves its command line beside the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                saved = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError) as error:
        reason = (str(error).splitlines() or ["it is empty"])[0]
        raise ConfigError(f"init_from={path!r} cannot be read ({reason}); use a file of torch.save") from None
    return _unwrapped(saved, path)


def _unwrapped(saved: object, path: str) -> dict[str, torch.Tensor]:
    """The tensors by name in what was read: itself, or under "model" or "state_dict", or a checkpoint of ours.

    Of a checkpoint of ours the moving average, "ema", comes first.
    """
    for key in ("ema", "model", "state_dict"):
        if isinstance(saved, Mapping) and isinstance(saved.get(key), Mapping):
            saved = saved[key]
    if isinstance(saved, Mapping) and "parameters" in saved and "buffers" in saved:
        saved = {**saved["parameters"], **saved["buffers"]}
    if not isinstance(saved, Mapping) or not all(isinstance(value, torch.Tensor) for value in saved.values()):
        raise ConfigError(f"init_from={path!r} holds no tensors by name; use a state dict")
    prefix = "module." if all(name.startswith("module.") for name in saved) else ""  # of DistributedDataParallel
    return {name.removeprefix(prefix): tensor for name, tensor in saved.items()}
