"""The libraries whose neurons `chi.attach` measures, as the tests' environment has them."""

import importlib
import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest


def spikingjelly() -> SimpleNamespace:
    """`functional`, `layer`, `neuron` and `surrogate`; skips the test where the package is absent."""
    _stand_in_for_torchvision()
    parts = ("functional", "layer", "neuron", "surrogate")
    return SimpleNamespace(**{part: _module(f"spikingjelly.activation_based.{part}") for part in parts})


def spikingjelly_frames() -> ModuleType:
    """SpikingJelly's conversion of events to frames; skips the test where the package is absent.

    One file of it: the rest of its data sets needs more of torchvision.
    """
    _stand_in_for_torchvision()
    path = Path(_module("spikingjelly").__file__ or "").parent / "datasets" / "utils.py"
    if not path.exists():
        pytest.skip(f"there is no {path}; make test installs a newer SpikingJelly")
    spec = importlib.util.spec_from_file_location("spikingjelly.datasets.utils", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _stand_in_for_torchvision() -> None:
    """SpikingJelly imports it for helpers, and its operators do not load beside a CPU build of torch."""
    for name in ("torchvision", "torchvision.models", "torchvision.models.utils", "torchvision.transforms"):
        stub = sys.modules.setdefault(name, ModuleType(name))
        stub.__spec__ = stub.__spec__ or ModuleSpec(name, None)  # find_spec of other tests reads it
    sys.modules["torchvision.models.utils"].load_state_dict_from_url = None  # pyright: ignore
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]  # pyright: ignore


def snntorch() -> ModuleType:
    return _module("snntorch")


def norse() -> ModuleType:
    return _module("norse.torch")


def _module(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return pytest.skip(f"{error}; make test installs it")
