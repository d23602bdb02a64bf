"""A trained network as a program of plain operations, for runtimes without this package: torch.export and ONNX.

The definition of the neurons (`kernels/reference.py`) is traced in evaluation mode, its T steps unrolled. Images
`(N, C, H, W)`, with any N, become logits `(T, N, K)`; a network for event frames is not written.
"""

import copy
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

ABOUT = "about.json"
"""Name of the metadata within a .pt2 file: `torch.export.load(path, extra_files={"about.json": ""})` reads them."""


def program(network: nn.Module, *, in_channels: int = 3, image_size: int) -> ExportedProgram:
    """The network's evaluation as a program for images of this size, on the CPU, in the network's dtype."""
    with _evaluating(network) as (ready, images):
        return torch.export.export(ready, images(in_channels, image_size), dynamic_shapes=({0: Dim("N")},))


def save_program(path: Path, exported: ExportedProgram, about: Mapping[str, str] | None = None) -> None:
    """Writes a file that `torch.export.load` reads, wherever torch is, with `about` as its file about.json."""
    with path.open("wb") as file:
        torch.export.save(exported, file, extra_files={ABOUT: json.dumps(dict(about or {}), ensure_ascii=False)})


def save_onnx(
    path: Path,
    network: nn.Module,
    *,
    in_channels: int = 3,
    image_size: int,
    about: Mapping[str, str] | None = None,
) -> None:
    """Writes the network as a model of ONNX, input `images` and output `logits`, in fp32, with `about` as its metadata.

    Needs the packages onnx and onnxscript.
    """
    with _evaluating(copy.deepcopy(network).float()) as (ready, images), _quiet():
        model = torch.onnx.export(
            ready,
            images(in_channels, image_size),
            dynamo=True,
            dynamic_shapes=({0: Dim("N")},),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    assert model is not None
    model.model.metadata_props.update(about or {})
    model.save(path)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator:
    """The network in evaluation mode, without gradients, and what makes its example: two black images."""
    was_training = network.training
    like = next(network.parameters())

    def images(in_channels: int, size: int) -> tuple[torch.Tensor]:
        # Two: a program traced with one image would be for one alone.
        return (torch.zeros(2, in_channels, size, size, dtype=like.dtype, device=like.device),)

    try:
        with torch.no_grad():  # with gradients the pooling is an operation of ours
            yield network.eval(), images
    finally:
        network.train(was_training)


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing is said of what torch's exporter lacks for other networks, or will change in itself."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
