"""Starts a run from weights of another run or of published code, for fine-tuning; from a run, its widths too.

What is read: a run's folder or one of its checkpoints, a safetensors file, or a file of torch.save (the original
SEW-ResNet code's among them, with its weights under "model"). Names may be in any layout of snn/state_dicts.py. Every
tensor must fit, except the classifier's, which starts anew if the number of classes differs. A checkpoint of ours also
holds the last widths of its layers; a new run with the same layers, surrogate and model.width starts from them.
"""

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pipeline.config import Config, ModelConfig
from pipeline.config.checks import LARGEST, SMALLEST
from pipeline.errors import ConfigError, is_outage
from pipeline.run_dir import checkpoint_files
from pipeline.snn import state_dicts
from pipeline.snn.networks.network import Network


class Start(NamedTuple):
    """What a run starts from."""

    said: str
    """What matched, in a line."""
    widths: torch.Tensor | None
    """`(L,)` float64, of the surrogates; None if they are not taken."""


def load(network: Network, config: Config) -> Start:
    """Puts the weights at `config.init_from` into `network`.

    Raises:
        ConfigError: nothing readable is there, or a tensor is missing, left over or of another shape.
    """
    path = config.init_from
    saved = read(path)
    said = _load_weights(network, _unwrapped(saved, path), path)
    widths, why_not = _widths(saved, config.model, len(network.spiking_layers()))
    if widths is None:
        instead = "chi.calibrate" if config.chi.calibrates else f"model.width={config.model.width:g}"
        return Start(f"{said}; widths start from {instead}, since {why_not}", None)
    said += f"; widths {widths.min():.3g} to {widths.max():.3g}, with which that run ended"
    return Start(f"{said}, and chi.calibrate is left out" if config.chi.calibrates else said, widths)


def _widths(saved: object, model: ModelConfig, num_layers: int) -> tuple[torch.Tensor | None, str]:
    """The widths in `saved`, `(L,)`, or None and why a network of `model` with `num_layers` layers cannot use them."""
    kept = saved.get("widths") if isinstance(saved, Mapping) else None
    log_width = kept.get("log_width") if isinstance(kept, Mapping) else None
    if not isinstance(saved, Mapping) or not isinstance(log_width, torch.Tensor):
        return None, "it holds weights alone"
    if log_width.shape != (num_layers,):
        return None, f"that run has {log_width.numel()} spiking layers and not {num_layers}"
    config = saved.get("config")
    before = config.get("model") if isinstance(config, Mapping) else None
    before = before if isinstance(before, Mapping) else {}
    # A width of another surrogate means something else; another model.width is the user's choice.
    for name in ("surrogate", "width"):
        ours = getattr(model, name)
        if before.get(name, ours) != ours:
            return None, f"model.{name} was {before[name]!r} in that run and is {ours!r}"
    widths = log_width.double().exp()
    if not bool(((widths >= SMALLEST) & (widths <= LARGEST)).all()):
        return None, "those of that run are not finite"
    return widths, ""


def _load_weights(network: Network, tensors: dict[str, torch.Tensor], path: str) -> str:
    """Loads the tensors into the network; returns what matched, in a line."""
    ours = network.state_dict()
    buffers = dict(network.named_buffers())  # a checkpoint has those too that a state dict leaves out
    tensors = {name: tensor for name, tensor in tensors.items() if name in ours or name not in buffers}
    weights = state_dicts.as_in(ours, tensors)
    others = [name for name in ours if name in weights and weights[name].shape != ours[name].shape]
    ends = bool(others) and others[-1] == list(ours)[-1]  # a classifier comes last; a table of positions does not
    anew = ends and _of_other_classes([weights[name].shape for name in others], [ours[name].shape for name in others])
    before, now = (weights[others[0]].shape[0], ours[others[0]].shape[0]) if anew else (0, 0)
    if anew:
        weights |= {name: ours[name] for name in others}
    try:
        state_dicts.load(network, weights)
    except ValueError as error:
        raise ConfigError(f"init_from={path!r}: {error}") from None
    matched = len(ours) - (len(others) if anew else 0)
    said = f"init_from: {matched} of {len(ours)} tensors from {path}"
    if anew:
        said += f"; the classifier starts anew, from {before} classes to {now}"
    return said


def _of_other_classes(theirs: list[torch.Size], ours: list[torch.Size]) -> bool:
    """Whether the tensors that do not fit are a classifier's of another number of classes, its first dimension."""
    pairs = {(before[0], now[0]) for before, now in zip(theirs, ours, strict=True) if before and now}
    return len(pairs) == 1 and all(before[1:] == now[1:] for before, now in zip(theirs, ours, strict=True))


def read(path: str) -> object:
    """What lies at `path`, on the CPU: a state dict or what it is wrapped in."""
    try:
        if Path(path).is_dir():
            saved = checkpoint_files.load(Path(path)) if (Path(path) / "state.pt").exists() else None
            saved = saved or checkpoint_files.load_newest(Path(path))
            if saved is None:
                raise ConfigError(f"init_from={path!r} holds no whole checkpoint; name a run's folder or a file")
        elif path.endswith(".safetensors"):
            return load_file(path)
        else:
            # The original code saves its command line with the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                saved = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(saved, dict) and "controller" in saved:
                saved = checkpoint_files.converted(saved, Path(path))
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError) as error:
        if isinstance(error, OSError) and is_outage(error):
            raise
        reason = (str(error).splitlines() or ["it is empty"])[0]
        raise ConfigError(f"init_from={path!r} cannot be read ({reason}); use a file of torch.save") from None
    return saved


def _unwrapped(saved: object, path: str) -> dict[str, torch.Tensor]:
    """The tensors by name in `saved`: at its top, under "model" or "state_dict", or in a checkpoint of ours.

    From a checkpoint of ours, the moving average "ema" is taken first.
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
