"""A run's checkpoint as a plain network: no ranks, no DeepSpeed."""

from pathlib import Path
from typing import NamedTuple

import torch

from pipeline.config import Config
from pipeline.data.manifest import EVENT_CHANNELS, EVENTS, IMAGE_CHANNELS
from pipeline.errors import ConfigError
from pipeline.run_dir import checkpoint_files, run_folder
from pipeline.snn import state_dicts
from pipeline.snn.networks import own_source
from pipeline.snn.networks.build import build
from pipeline.snn.networks.network import Network


class Trained(NamedTuple):
    step: int
    """Optimizer steps after which the weights were saved."""
    weights: str
    """Which weights: last, or ema (their moving average)."""
    num_classes: int
    network: Network
    """In evaluation mode, in fp32 (fp64 where the run trained in it), on the CPU."""
    widths: torch.Tensor
    """Of the surrogates, `(L,)` fp32."""
    amplitudes: torch.Tensor
    """Of the surrogates, `(L,)` fp32."""


PARAMETERS = {"fp16": torch.float16, "fp64": torch.float64}
"""dtype of the parameters in each precision; fp32 in the others."""


def cast(network: Network, precision: str) -> None:
    """Gives the network the dtypes that it has in a run of this precision.

    In fp16 the parameters alone are cast, as DeepSpeed does: batch normalisation's statistics stay fp32.
    """
    dtype = PARAMETERS.get(precision, torch.float32)
    if precision == "fp64":
        network.double()  # the statistics too
        return
    network.float()
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)


def load(run_dir: Path, config: Config, *, step: int | None = None, weights: str | None = None) -> Trained:
    """The network of the checkpoint after `step`; of the newest intact one if `step` is None.

    `weights` are last, or ema (their moving average); None takes ema if the run keeps one. `config` is the run's; only
    `model.T` and `data.image_size` may differ.

    Raises:
        ConfigError: there is no such checkpoint, it does not fit `config`, or it holds no average.
        DataError: it is damaged.
    """
    found = checkpoint_files.load_newest(run_dir) if step is None else checkpoint_files.load_step(run_dir, step)
    if found is None:
        raise ConfigError(f"{run_dir} has no whole checkpoint; the first comes after train.checkpoint_every steps")
    average = found.get("ema")
    if weights == "ema" and average is None:
        raise ConfigError(f"{run_dir} keeps no moving average of its weights (train.ema_decay=0); use --weights last")
    chosen = found["model"] if average is None or weights == "last" else average
    tensors = {**chosen["parameters"], **chosen["buffers"]}
    about = run_folder.read(run_dir).about
    source = own_source.find(config.model.arch, run_dir)
    if source is not None:
        same = source.digest == about.get("network_sha256", source.digest)
        other = run_folder.changed_import(about, source.folder) if same else source.path
        if other is not None:
            raise ConfigError(
                f"{other} is not the code that {run_dir} was trained with: its SHA-256 is another; bring that back"
            )
    num_classes = len(about.get("classes") or tensors["fc.weight"])  # older runs have no record of their classes
    network = build(
        config.model,
        num_classes=num_classes,
        in_channels=EVENT_CHANNELS if about.get("kind") == EVENTS else IMAGE_CHANNELS,
        image_size=config.data.image_size,
        run=run_dir,
    ).eval()
    network.to(next(iter(chosen["parameters"].values())).dtype)
    saved, there = network.state_dict(), dict(network.named_buffers())
    tensors = {name: tensor for name, tensor in tensors.items() if name in saved or name not in there}  # persistent
    try:
        state_dicts.load(network, tensors)
    except ValueError as error:
        raise ConfigError(f"the checkpoint after step {found['step']} of {run_dir}: {error}") from None
    return Trained(
        step=found["step"],
        weights="ema" if chosen is average else "last",
        num_classes=num_classes,
        network=network,
        widths=found["widths"]["log_width"].exp().float(),
        amplitudes=found["widths"]["amplitudes"],
    )
