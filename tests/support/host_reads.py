"""Finds what makes the host wait for the device, or cannot be captured in a CUDA graph, on a machine without a GPU.

On a CPU such a call costs nothing and looks like any other, so two modes of torch watch for it: one sees what Python
calls (`.cpu()` on a CPU runs no operator), one sees the operators that run inside other calls.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]

READS = re.compile(
    "item|tolist|cpu|numpy|__(bool|int|float|index|complex|array|contains|format|repr)__|"
    "is_nonzero|nonzero|argwhere|masked_select|unique|unique_consecutive|equal|allclose|pin_memory"
)
"""Functions and methods of torch whose result, or its size, the host must know."""
OPERATORS = re.compile(
    "_local_scalar_dense|is_nonzero|nonzero|masked_select|_unique2|unique_dim|unique_consecutive|equal|bincount|"
    "lift_fresh"  # makes a tensor from Python's numbers
)
"""Operators of the same kind."""
MASKED = re.compile("index|index_put_?|_index_put_impl_")
"""Operators whose size depends on the values where an index is a mask."""


class Read(NamedTuple):
    """A call for which the host waits."""

    what: str
    where: str
    """File and function of this project or of DeepSpeed, whichever is nearer to the call."""


@contextmanager
def watched(reads: list[Read]) -> Iterator[None]:
    """Adds every read of this thread, in forward and backward passes alike, to `reads`."""
    with _Calls(reads), _Operators(reads):
        yield


class _Calls(TorchFunctionMode):
    def __init__(self, reads: list[Read]) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if READS.fullmatch(name) or (name == "to" and _waits_for_transfer(args, kwargs)):
            self._reads.append(Read(name, caller()))
        return func(*args, **kwargs)


class _Operators(TorchDispatchMode):
    def __init__(self, reads: list[Read]) -> None:
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        of_unknown_size = (MASKED.fullmatch(name) and _has_mask(args[1])) or (
            name == "repeat_interleave" and kwargs.get("output_size") is None
        )
        if OPERATORS.fullmatch(name) or of_unknown_size:
            self._reads.append(Read(name, caller()))
        return func(*args, **kwargs)


def _waits_for_transfer(args: tuple, kwargs: dict) -> bool:
    """Whether `.to` names a device and lets the host wait for the copy."""
    places = [*args[1:2], kwargs.get("device")]
    named = any(isinstance(place, (str, int, torch.device)) for place in places)
    return named and not kwargs.get("non_blocking", False)


def _has_mask(indices: list) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def caller() -> str:
    """The nearest function outside torch that led here, as `pipeline/chi/tap.py read`; of a test its own name."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if frame.f_code.co_name.endswith("comp>"):  # a frame of its own before Python 3.12
            pass
        elif "/site-packages/deepspeed/" in path:
            return f"deepspeed/{path.split('/site-packages/deepspeed/')[1]} {frame.f_code.co_name}"
        elif path.startswith(str(ROOT)) and "/site-packages/" not in path and path != __file__:
            return f"{Path(path).relative_to(ROOT)} {frame.f_code.co_name}"
        frame = frame.f_back
    return "?"
