"""Registers, spills and shared memory of every Triton kernel, compiled ahead of time: no GPU is needed.

    python -m benchmarks.kernel_table [--json FILE]

The launches are those of one micro-batch of SEW-ResNet34 and of χ's sums, noted on meta tensors (launches.py), so each
kernel is compiled as Triton would specialise it there: its constants, dtypes, alignments, warps. The figures are read
from the machine code by NVIDIA's cuobjdump, which Triton brings. A spill is local memory: registers that did not fit.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks import launches, table
from benchmarks.launches import DTYPES, Launch
from pipeline.snn.kernels import sums

ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
"""A100; H100, H200; B200."""
BATCHES = (64, 256)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(slots=True)
class Variant:
    """What Triton compiles once: a kernel with its constants and the types of its arguments."""

    kernel: str
    source: ASTSource
    options: dict
    """Triton's, where they differ from its defaults: num_warps and others."""
    count: dict[int, int] = field(default_factory=dict)
    """Launches a micro-batch, by its size."""

    @property
    def constants(self) -> dict[str, object]:
        """The values that are compiled in and choose the code, by name; those of absent tensors are left out."""
        names = self.source.fn.arg_names
        named = {names[path[0]]: value for path, value in self.source.constants.items()}
        return {name: value for name, value in named.items() if value is not None}


def noted(dtype: torch.dtype, batch: int, *, T: int = 4, frames: bool = False, **fields) -> list[Launch]:
    """The launches of one micro-batch of SEW-ResNet34 at 224 x 224, and of χ's sums over its gradients.

    Args:
        dtype: of the convolutions and the gradients. With fp16 the parameters of BN are fp16 too, as DeepSpeed has it.
        batch: N.
        T, fields: of the model's configuration.
        frames: event frames (T, N, ...) instead of images.
    """
    net = launches.network(dtype, T=T, **fields)
    if dtype == torch.float16:
        for parameter in net.parameters():
            parameter.data = parameter.data.half()
    shape = (T, batch, 3, 224, 224) if frames else (batch, 3, 224, 224)
    passes = launches.trace(net, torch.empty(shape, dtype=dtype, device="meta"))
    with launches.noted() as of_sums:
        sums.run([torch.empty_like(parameter, dtype=dtype) for parameter in net.parameters()])
    return [*passes[0].launches, *passes[1].launches, *of_sums]


def variants(noted: Mapping[int, Iterable[Launch]], capability: int) -> list[Variant]:
    """What is compiled for these launches, by batch, in the order of their first launch."""
    backend = make_backend(GPUTarget("cuda", capability, 32))
    found: dict[str, Variant] = {}
    for batch, made in noted.items():
        for launch in made:
            kernel = launch.kernel
            bind = create_function_from_signature(kernel.signature, kernel.params, backend)
            bound, specialization, _ = bind(**launch.arguments)
            _, signature, constants, attributes = kernel._pack_args(
                backend, dict(launch.options), bound, specialization, None
            )
            key = repr((kernel, signature, constants, attributes, launch.options))
            source = ASTSource(kernel, signature, constants, attributes)
            variant = found.setdefault(key, Variant(launch.name, source, launch.options))
            variant.count[batch] = variant.count.get(batch, 0) + 1
    return list(found.values())


def why_not() -> str:
    """Why kernels cannot be compiled here; empty if they can."""
    missing = [name for name in ("ptxas", "cuobjdump") if not (_TOOLS / name).exists()]
    return f"{' and '.join(missing)} not found in {_TOOLS}; install triton from its wheel" if missing else ""


def figures(variant: Variant, capability: int) -> dict[str, int]:
    """Registers a thread, spilled bytes a thread, bytes of shared memory and warps a block."""
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(variant.source, target=target, options=dict(variant.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = [_TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        text = subprocess.run(tool, check=True, capture_output=True, text=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "registers": usage["REG"],
        "spilled_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": built.metadata.shared,
        "warps": built.metadata.num_warps,
    }


def measured(dtypes: Iterable[str] = tuple(DTYPES)) -> list[dict]:
    """The table: a line for each kernel, constants and dtype, with the figures by architecture."""
    lines = []
    for dtype in dtypes:
        made = {batch: noted(DTYPES[dtype], batch) for batch in BATCHES}
        for architecture, capability in ARCHITECTURES.items():
            for place, variant in enumerate(variants(made, capability)):
                if architecture == next(iter(ARCHITECTURES)):
                    counts = {str(batch): variant.count.get(batch, 0) for batch in BATCHES}
                    line = {
                        "kernel": variant.kernel,
                        "dtype": dtype,
                        "constants": variant.constants,
                        "launches": counts,
                    }
                    lines.append(line | {"place": place, "figures": {}})
                line = next(one for one in lines if (one["dtype"], one["place"]) == (dtype, place))
                line["figures"][architecture] = figures(variant, capability)
    for line in lines:
        del line["place"]
    return lines


def by_kernel(lines: list[dict]) -> list[str]:
    """The table as Markdown: a kernel's most registers, spilled bytes and shared memory in any of its variants."""
    rows = [
        f"| kernel | variants | registers, {' / '.join(ARCHITECTURES)} | spilled bytes | shared bytes |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kernel in dict.fromkeys(line["kernel"] for line in lines):
        found = [line["figures"] for line in lines if line["kernel"] == kernel]
        most = {
            figure: [max(one[architecture][figure] for one in found) for architecture in ARCHITECTURES]
            for figure in ("registers", "spilled_bytes", "shared_bytes")
        }
        registers = " / ".join(str(number) for number in most["registers"])
        rows.append(
            f"| `{kernel}` | {len(found)} | {registers} | {max(most['spilled_bytes'])} | {max(most['shared_bytes'])} |"
        )
    return rows


def summary(lines: list[dict]) -> list[dict]:
    """The most of all kernels, by architecture."""
    rows = []
    for architecture in ARCHITECTURES:
        found = [line["figures"][architecture] for line in lines]
        rows += [
            table.row(f"{architecture}: registers, most", max(one["registers"] for one in found), "a thread"),
            table.row(f"{architecture}: spilled, all", sum(one["spilled_bytes"] for one in found), "bytes", 0, "lower"),
            table.row(f"{architecture}: shared memory, most", max(one["shared_bytes"] for one in found), "bytes"),
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    if why_not():
        raise SystemExit(why_not())
    lines = measured()
    print(*by_kernel(lines), sep="\n")
    rows = summary(lines)
    table.show(rows)
    if arguments.json:
        table.write(
            arguments.json,
            rows,
            hardware="none: compiled ahead of time by the ptxas that Triton brings",
            versions={"torch": torch.__version__, "triton": triton.__version__},
            command="python -m benchmarks.kernel_table --json benchmarks/results/kernel_table.json",
            setting="SEW-ResNet34, IF, triangle, T=4, 224 x 224, batch 64 and 256, and the sums of its gradients",
            kernels=lines,
        )


if __name__ == "__main__":
    main()
