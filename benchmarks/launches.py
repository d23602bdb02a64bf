"""Kernel launches and torch calls of one micro-batch of SEW-ResNet34 on the GPU path, counted without a GPU.

    python -m benchmarks.launches [--json FILE]

The network runs on meta tensors: shapes only, of any size. Every launch of a Triton kernel is noted instead of run,
and every call of a torch operator is counted. Not counted are the casts of autocast, the engine around the network
(loss scale, reduction, optimizer), and the several kernels that one torch operator may launch, above all convolutions.
"""

import argparse
import importlib
import inspect
import pkgutil
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import table
from pipeline.config import ModelConfig
from pipeline.snn import kernels as kernel_files
from pipeline.snn import losses, neurons
from pipeline.snn.kernels import dispatch, fused_triton, packing
from pipeline.snn.networks.build import build
from pipeline.snn.networks.network import Network

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAST = torch.channels_last
_MODULES = tuple(
    importlib.import_module(f"{kernel_files.__name__}.{file.name}")
    for file in pkgutil.iter_modules(kernel_files.__path__)
    if file.name.endswith("_triton")
)
"""The files whose kernels are noted: every pipeline/snn/kernels/*_triton.py."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a kernel."""

    kernel: Any
    """The `triton.jit` function."""
    grid: tuple[int, ...]
    arguments: dict
    """By name, as the kernel's caller passed them."""
    options: dict = field(default_factory=dict)
    """What the caller set of Triton's options, such as num_warps."""

    @property
    def name(self) -> str:
        return self.kernel.__name__.lstrip("_")


@dataclass(frozen=True, slots=True)
class _Noted:
    """Stands for a kernel; a launch of it is put into a list."""

    kernel: Any
    into: list[Launch]

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*args, **kwargs) -> None:
            signature = inspect.signature(self.kernel.fn)
            options = {name: kwargs.pop(name) for name in [*kwargs] if name not in signature.parameters}
            bound = signature.bind(*args, **kwargs)
            self.into.append(Launch(self.kernel, tuple(grid), dict(bound.arguments), options))

        return launch


def kernels() -> list:
    """Every kernel of the files, without the functions that only other kernels call."""
    found = [
        function
        for module in _MODULES
        for function in vars(module).values()
        if _is_kernel(function) and function.fn.__module__ == module.__name__
    ]
    bodies = [inspect.getsource(function.fn).split("):", 1)[1] for function in found]
    return [one for one in found if not any(re.search(rf"\b{one.fn.__name__}\(", body) for body in bodies)]


def _is_kernel(value: Any) -> bool:
    return hasattr(value, "fn") and hasattr(value, "__getitem__")


def _statistics(y, eps):
    return tuple(y.new_empty(y.shape[1], dtype=torch.float32) for _ in range(2))


def _convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    """cuDNN keeps channels-last; torch's own rule for meta tensors does not."""
    sides = zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)
    size = [(side + 2 * pad - kernel) // step + 1 for side, kernel, step, pad in sides]
    return torch.empty((x.shape[0], weight.shape[0], *size), dtype=x.dtype, device="meta", memory_format=LAST)


def _gradients(grad, x, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, mask):
    made = (torch.empty_like(x, memory_format=LAST), torch.empty_like(weight), None)
    return tuple(gradient if wanted else None for gradient, wanted in zip(made, mask, strict=True))


@contextmanager
def noted() -> Iterator[list[Launch]]:
    """While the block runs, tensors of any device take the GPU path; its launches are put into the list, not run."""
    launches: list[Launch] = []
    replaced = [
        (module, name, value) for module in _MODULES for name, value in vars(module).items() if _is_kernel(value)
    ]
    choose, gpu_kernels, library = dispatch.choose, dispatch.gpu_kernels, packing.compiled.library
    meta = torch.library.Library("aten", "IMPL", "Meta")
    for name, shapes in (
        ("batch_norm_stats", _statistics),
        ("convolution", _convolution),
        ("convolution_backward", _gradients),
    ):
        meta.impl(name, shapes)
    try:
        for module, name, value in replaced:
            setattr(module, name, _Noted(value, launches))
        dispatch.choose = lambda x, rule: fused_triton.Call if x.numel() else None
        dispatch.gpu_kernels = lambda x: fused_triton
        packing.compiled.library = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]
        yield launches
    finally:
        meta._destroy()
        dispatch.choose, dispatch.gpu_kernels, packing.compiled.library = choose, gpu_kernels, library
        for module, name, value in replaced:
            setattr(module, name, value)


class Calls(TorchDispatchMode):
    """Counts the calls of torch operators by name; those that only make a view or an empty tensor apart."""

    def __init__(self) -> None:
        super().__init__()
        self.launching: Counter[str] = Counter()
        self.free: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        free = func.is_view or name in ("empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view")
        (self.free if free else self.launching)[name] += 1
        return func(*args, **(kwargs or {}))


@dataclass(slots=True)
class Pass:
    """What a forward or a backward pass called."""

    launches: list[Launch] = field(default_factory=list)
    calls: Calls = field(default_factory=Calls)

    @property
    def total(self) -> int:
        """Launches of kernels and of torch operators."""
        return len(self.launches) + self.calls.launching.total()


def network(dtype: torch.dtype, *, arch: str = "sew_resnet34", T: int = 4, **fields) -> Network:
    """On the meta device: convolutions in `dtype`, batch normalisation in fp32, counters bound."""
    with torch.device("meta"):
        net = build(ModelConfig(arch=arch, T=T, **fields), num_classes=1000, image_size=224)
    for module in net.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.to(dtype)
    neurons.bind(net)
    return net.train()


def trace(net: Network, images: torch.Tensor) -> tuple[Pass, Pass]:
    """The forward and the backward pass of one micro-batch, on the images' device, which may be meta."""
    passes = Pass(), Pass()
    labels = torch.zeros(images.shape[-4], dtype=torch.long, device=images.device)
    with noted() as launches:
        with passes[0].calls:
            loss = losses.cross_entropy(net(images), labels)
        passes[0].launches += launches
        launches.clear()
        with passes[1].calls:
            loss.backward()
        passes[1].launches += launches
    return passes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--batch", type=int, default=32)
    arguments = parser.parse_args()
    passes = trace(network(torch.bfloat16), torch.empty(arguments.batch, 3, 224, 224, device="meta").bfloat16())
    lines, by_name = [], {}
    for name, one in zip(("forward", "backward"), passes, strict=True):
        by_name[name] = Counter(launch.name for launch in one.launches) + one.calls.launching
        lines += [
            table.row(f"{name}: Triton kernels", len(one.launches), "launches"),
            table.row(f"{name}: torch operators", one.calls.launching.total(), "calls"),
            table.row(f"{name}: views and empty tensors", one.calls.free.total(), "calls"),
        ]
    table.show(lines)
    if arguments.json:
        table.write(
            arguments.json,
            lines,
            hardware="none: counted on meta tensors",
            versions={"torch": torch.__version__},
            command="python -m benchmarks.launches",
            setting=f"SEW-ResNet34, T=4, batch {arguments.batch}, 224 x 224, bf16 convolutions, one micro-batch",
            calls={name: dict(counted.most_common()) for name, counted in by_name.items()},
        )


if __name__ == "__main__":
    main()
