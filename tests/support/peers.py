"""The libraries whose neurons `chi.attach` measures, as the tests' environment has them."""

import importlib
import sys
import types
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest


def spikingjelly() -> SimpleNamespace:
    """`functional`, `layer`, `neuron` and `surrogate`; skips the test where the package is absent."""
    # It imports torchvision for a download helper, and torchvision's operators do not load beside a CPU build of torch.
    for name in ("torchvision", "torchvision.models", "torchvision.models.utils"):
        stub = sys.modules.setdefault(name, ModuleType(name))
        stub.__spec__ = stub.__spec__ or ModuleSpec(name, None)  # find_spec of other tests reads it
    sys.modules["torchvision.models.utils"].load_state_dict_from_url = None  # pyright: ignore
    parts = ("functional", "layer", "neuron", "surrogate")
    return SimpleNamespace(**{part: _module(f"spikingjelly.activation_based.{part}") for part in parts})


def snntorch() -> ModuleType:
    return _module("snntorch")


def norse() -> ModuleType:
    return _module("norse.torch")


def _module(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return pytest.skip(f"{error}; make test installs it")
