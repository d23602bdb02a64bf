"""A trained network as a program of plain operations, for runtimes without this package: torch.export and ONNX.

The definition of the neurons (`kernels/reference.py`) is traced in evaluation mode, its T steps unrolled. Images
`(N, C, H, W)` or event frames `(T, N, C, H, W)`, with any N, become logits `(T, N, K)`. T is part of the program: of
frames it takes as many as it was traced with, and no other number.
"""

import copy
import io
import json
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from pipeline.errors import ConfigError, first_line

ABOUT = "about.json"
"""Name of the metadata within a .pt2 file: `torch.export.load(path, extra_files={"about.json": ""})` reads them."""

COMPUTED_N = (1, 3)
"""Batch sizes for which the program and the network are compared; one was traced with 2."""
TRIED_N = (*range(4, 65), 100, 127, 128, 1000, 1023, 4096, 10**6)
"""Batch sizes for which the conditions that torch.export found on N are looked at; nothing is computed."""
_FIXED = (
    "torch.export cannot trace the network for any N ({}); take N from images.shape, not by len(images), int() or as a "
    "number, and take out branches on N and squeeze(), or use --format safetensors"
)


def program(
    network: nn.Module, *, in_channels: int = 3, image_size: int, num_frames: int | None = None
) -> ExportedProgram:
    """The network's evaluation as a program for inputs of this size, on the CPU, in the network's dtype.

    Args:
        network: takes images or event frames.
        in_channels: C of them.
        image_size: H = W of them, in pixels.
        num_frames: T of event frames; None: the network gets images.

    Raises:
        ConfigError: torch.export cannot trace a pass for any N, or what it traced computes something else.
    """
    was_training = network.training
    like = next(network.parameters())
    steps = () if num_frames is None else (num_frames,)
    # Two images, or recordings: a program traced with one would be for one alone.
    example = torch.zeros(*steps, 2, in_channels, image_size, image_size, dtype=like.dtype, device=like.device)
    try:
        with torch.no_grad():  # with gradients the pooling is an operation of ours
            network.eval()(example)  # what a first pass keeps is there before the trace, which takes nothing from it
            exported = _traced(network, example, ({len(steps): Dim.DYNAMIC},))
            _check(network, exported, example, len(steps))
            return exported
    finally:
        network.train(was_training)


def _traced(network: nn.Module, example: torch.Tensor, free: tuple[dict]) -> ExportedProgram:
    said = io.StringIO()
    try:
        with redirect_stderr(said), warnings.catch_warnings():
            # A pass starts from rest, so what neurons of other libraries keep of the traced one is never read.
            warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export")
            exported = torch.export.export(network, (example,), dynamic_shapes=free)
    except Exception as error:  # of any kind: a user's network is traced line by line
        if str(error).startswith("Constraints violated"):  # the reason is in the second line, up to a cure of torch's
            reason = str(error).splitlines()[1].strip(" -").partition(". If ")[0]
            raise ConfigError(_FIXED.format(re.sub(r"L\['\w+'\]\.size\(\)\[\d\]", "N", reason))) from error
        lines = [one for one in traceback.extract_tb(error.__traceback__) if "site-packages" not in one.filename]
        at = "" if lines[-1].filename == __file__ else f"{lines[-1].filename}:{lines[-1].lineno}: "
        raise ConfigError(
            f"torch.export cannot trace the network ({at}{first_line(error)}); a pass has to do the same operations "
            "whatever the values: take out .item(), .numpy() and branches on values, or use --format safetensors"
        ) from error
    print(end=said.getvalue(), file=sys.stderr)  # warnings; where it fails, torch also prints the whole graph
    return exported


def _check(network: nn.Module, exported: ExportedProgram, example: torch.Tensor, batch: int) -> None:
    """Raises ConfigError where the program is not for any N, dimension `batch`, or does not give the network's bits."""
    module = exported.module()
    conditions = dict(module.named_children()).get("_guards_fn")  # on N, each an assertion
    for number in (*COMPUTED_N, *TRIED_N):
        like = example.new_empty((*example.shape[:batch], number, *example.shape[batch + 1 :]), device="meta")
        same = True
        try:
            if number in COMPUTED_N:
                given = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(example)
                same = torch.equal(module(given), network(given))
            elif conditions is not None:
                conditions(like)
        except Exception as error:  # of any kind: the user's network may not take this N
            raise ConfigError(_FIXED.format(f"N={number}: {first_line(error)}")) from error
        if not same:
            raise ConfigError(_FIXED.format(f"N={number}: the program gives other logits than the network"))


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
    num_frames: int | None = None,
    about: Mapping[str, str] | None = None,
) -> None:
    """Writes the network as a model of ONNX in fp32, with `about` as its metadata; arguments as of `program`.

    Its input is called `images`, or `frames` with `num_frames`; its output `logits`. Needs the packages onnx and
    onnxscript.

    Raises:
        ConfigError: torch.export cannot trace a pass for any N, or an operation has no form in ONNX.
    """
    single = copy.deepcopy(network).float()
    exported = program(single, in_channels=in_channels, image_size=image_size, num_frames=num_frames)
    try:
        with _quiet():
            # Of a program: given the network, torch would write one for two images alone where it cannot do more.
            model = torch.onnx.export(
                exported,
                dynamo=True,
                dynamic_shapes=({0 if num_frames is None else 1: Dim("N")},),
                input_names=["images" if num_frames is None else "frames"],
                output_names=["logits"],
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        why = first_line(error.__cause__ or error)
        raise ConfigError(f"the network cannot be written as ONNX ({why}); use --format torch_export") from error
    assert model is not None
    model.model.metadata_props.update(about or {})
    model.save(path)


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
