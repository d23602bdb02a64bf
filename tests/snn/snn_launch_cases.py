"""The grids and the addresses of every launch at sizes that no machine here holds; test_triton.py runs this file.

TRITON_INTERPRET=1 python -m pytest tests/snn/snn_launch_cases.py

Launches are noted on meta tensors. Then their first, middle and last programs run in Triton's interpreter, whose
integers wrap as a GPU's do, with addresses that have no memory behind them: each must lie within its tensor.
"""

import itertools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import mangle_type

from benchmarks import launches
from benchmarks.launches import Launch
from pipeline.config import ModelConfig
from pipeline.snn import neurons
from pipeline.snn.kernels import sums

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # arithmetic on what a load without memory gives
LIMITS = (2**31 - 1, 65_535, 65_535)
"""Blocks that CUDA allows in each dimension of a grid."""
PARTLY = ("partial_ptr",)
"""Buffers of which a launch may write some rows only."""


class Addresses:
    """Tensors of a launch with made-up addresses, and what the kernel's programs do with them."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.tensors = {name: one for name, one in launch.arguments.items() if isinstance(one, torch.Tensor)}
        # Far apart: an offset that wrapped falls outside of all of them. Tables on the CPU keep their memory.
        self.base = {
            name: (place + 16) << 48 if one.is_meta else one.data_ptr()
            for place, (name, one) in enumerate(self.tensors.items())
        }
        self.written: dict[str, tuple[int, int]] = {}

    def argument(self, name: str, value: object) -> object:
        """What the kernel is called with, as the interpreter's executor makes it."""
        if isinstance(value, torch.Tensor):
            kind: tl.dtype = tl.str_to_ty(mangle_type(value), None)  # pyright: ignore[reportAssignmentType]
            return tl.tensor(interpreter.TensorHandle(np.array([self.base[name]], dtype=np.uint64), kind), kind)
        if isinstance(value, int) and not isinstance(value, bool):
            kind = tl.int32 if value < 2**31 else tl.int64
            dtype = np.int32 if value < 2**31 else np.int64
            return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=dtype), kind), kind)
        return value

    def owner(self, pointers: np.ndarray, program: tuple[int, ...]) -> str | None:
        """The tensor that holds all these addresses, in use; None for none in use."""
        if not pointers.size:
            return None
        low, high = int(pointers.min()), int(pointers.max())
        for name, one in self.tensors.items():
            last = self.base[name] + (one.numel() - 1) * one.element_size()
            if self.base[name] <= low and high <= last:
                return name
        where = {name: low - base for name, base in self.base.items() if abs(low - base) < 2**47}
        raise AssertionError(f"{self.launch.name}, program {program} of {self.launch.grid}: out of bounds at {where}")

    def run(self, program: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        """One program of the launch."""
        builder = interpreter.interpreter_builder
        load = type(builder).create_masked_load.__get__(builder)

        def loaded(pointers, mask, other, *how):
            name = self.owner(pointers.data[mask.data], program)
            if name is None or self.tensors[name].is_meta:
                mask = interpreter.TensorHandle(np.zeros_like(mask.data), mask.dtype)
            return load(pointers, mask, other, *how)

        def stored(pointers, value, mask, *how):
            used = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
            name = self.owner(used, program)
            if name is not None:
                low, high = self.written.get(name, (int(used.min()), 0))
                self.written[name] = min(low, int(used.min())), max(high, int(used.max()))

        monkeypatch.setattr(builder, "create_masked_load", loaded)
        monkeypatch.setattr(builder, "create_masked_store", stored)
        kernel = self.launch.kernel
        function = kernel.rewrite()  # pyright: ignore[reportAttributeAccessIssue]
        constants = interpreter.GridExecutor(function, kernel.arg_names, self.launch.grid).constexprs  # pyright: ignore
        arguments = {
            name: value if name in constants else self.argument(name, value)
            for name, value in self.launch.arguments.items()
        }
        scope = interpreter._patch_lang(function)
        try:
            builder.set_grid_dim(*self.launch.grid, *[1] * (3 - len(self.launch.grid)))
            builder.set_grid_idx(*program, *[0] * (3 - len(program)))
            function(**arguments)
        finally:
            scope.restore()
            monkeypatch.undo()


def check_grid(launch: Launch) -> None:
    for size, limit in zip(launch.grid, LIMITS, strict=False):
        assert 0 < size <= limit, f"{launch.name}: a grid of {launch.grid} is not allowed"


def check_addresses(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outermost programs reach the first and the last element of what they write, and nothing outside."""
    addresses = Addresses(launch)
    for program in itertools.product(*({0, size // 2, size - 1} for size in launch.grid)):
        addresses.run(program, monkeypatch)
    assert addresses.written
    for name, (low, high) in addresses.written.items():
        one, base = addresses.tensors[name], addresses.base[name]
        if name not in PARTLY:
            assert (low, high) == (base, base + (one.numel() - 1) * one.element_size()), f"{launch.name}: {name}"


def check(made: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    """All grids, and the addresses of the largest launch of each kernel, constants and number of channels."""
    largest = {}
    for launch in sorted(made, key=lambda launch: max(one.numel() for one in Addresses(launch).tensors.values())):
        check_grid(launch)
        flags = [
            (name, one) for name, one in launch.arguments.items() if name.isupper() and name not in ("R", "H", "W")
        ]
        absent = [name for name, one in launch.arguments.items() if one is None]
        largest[launch.name, repr(flags), repr(absent)] = launch
    for launch in largest.values():
        check_addresses(launch, monkeypatch)


def test_every_launch_of_the_network_at_batch_1024_reaches_all_of_its_tensors(monkeypatch):
    network = launches.network(torch.bfloat16, T=16)
    passes = launches.trace(network, torch.empty(1024, 3, 224, 224, dtype=torch.bfloat16, device="meta"))
    made = [*passes[0].launches, *passes[1].launches]
    with launches.noted() as of_sums:
        sums.run([torch.empty(2**31 + 100, dtype=torch.bfloat16, device="meta")])
    made += of_sums
    assert {launch.kernel for launch in made} == set(launches.kernels())
    assert max(one.numel() for launch in made for one in Addresses(launch).tensors.values()) > 2**33
    check(made, monkeypatch)


@pytest.mark.parametrize("shape", [(16, 1024, 64, 112, 112), (40, 256, 64, 112, 112), (2, 2**31 + 100)])
def test_every_launch_of_neurons_without_channels_reaches_all_of_its_tensors(shape, monkeypatch):
    neuron = neurons.from_config(ModelConfig(neuron="plif"))
    neuron.to("meta")
    neurons.bind(neuron)
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
    v = torch.empty(shape[1:], device="meta", requires_grad=True)
    with launches.noted() as made:
        spikes, state = neuron.step(x, v)
        assert state is not None
        torch.autograd.backward((spikes, state), (torch.empty_like(spikes), torch.empty_like(state)))
    assert {launch.name for launch in made} == {"forward", "backward"}
    check(made, monkeypatch)


@triton.jit
def _in_32_bits(out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.zeros((BLOCK,), tl.float32), mask=at < n)


@triton.jit
def _too_few(out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.zeros((BLOCK,), tl.float32), mask=at < n - 1)


def test_what_wraps_or_is_left_out_or_has_too_large_a_grid_is_seen(monkeypatch):
    n = 2**31 + 100
    out = torch.empty(n, device="meta")
    arguments = {"out_ptr": out, "n": n, "BLOCK": 512}
    with pytest.raises(AssertionError, match="out of bounds"):
        check_addresses(Launch(_in_32_bits, (n // 512 + 1,), arguments), monkeypatch)
    with pytest.raises(AssertionError, match="out_ptr"):
        check_addresses(Launch(_too_few, (n // 512 + 1,), arguments), monkeypatch)
    with pytest.raises(AssertionError, match="not allowed"):
        check_grid(Launch(_too_few, (1, 65_536), arguments))
