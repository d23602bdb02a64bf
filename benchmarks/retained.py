"""Bytes a neuron-step that each tensor kept for the backward pass takes, against SpikingJelly 2.0's; no GPU is needed.

    python -m benchmarks.retained [--json FILE]

Expected is arithmetic from the code. Counted is what autograd saves when the same op runs on meta tensors on the GPU
path (launches.py), by torch's saved-tensor hooks; parameters are left out. The peer has two forms: with bf16 currents
its IF node keeps its potentials in bf16 and runs plain torch operations; its fused operator takes potentials in fp32
and saves the charged potentials, the currents and the first potential. (With its explicit precision settings, which
need a GPU, it saves 2 bytes, the charged potentials in bf16.)
"""

import argparse
import weakref
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import nn

from benchmarks import launches, table
from pipeline.config import ModelConfig
from pipeline.snn import neurons
from pipeline.snn.kernels import packing

T, N, C, SIDE = 4, 8, 64, 56
BF16 = torch.bfloat16
Expected = Mapping[str, tuple[str, float]]
"""Bytes a neuron-step of each tensor, with its dtype, by what it is."""

OURS: dict[str, Expected] = {
    "neurons": {"currents": ("bfloat16", 2)},
    "BN + neurons + shortcut": {"the convolution's output": ("bfloat16", 2)},
    "convolution of spikes": {"spikes (1 bit)": ("uint8", 1 / 8)},
    "convolution of sums to 15": {"sums (4 bits)": ("uint8", 1 / 2)},
    "pooling 3 x 3, stride 2": {"places of the maxima (1 an output)": ("uint8", 1 / 4)},
}
_PLAIN = {"potentials less the threshold": ("bfloat16", 2), "spikes of the reset": ("bfloat16", 2)}
_OUTPUT = {"the convolution's output": ("bfloat16", 2)}
_FUSED = {
    "charged potentials": ("float32", 4),
    "currents": ("bfloat16", 2),
    "first potentials (4/T)": ("float32", 4 / T),
}
PEER: dict[str, Expected] = {
    "neurons": _PLAIN,
    "neurons, fused": _FUSED,
    "BN + neurons + shortcut": _OUTPUT | _PLAIN,
    "BN + neurons + shortcut, fused": _OUTPUT | _FUSED,
    "convolution of spikes": {"spikes": ("bfloat16", 2)},
    "convolution of sums to 15": {"sums": ("bfloat16", 2)},
    "pooling 3 x 3, stride 2": {
        "spikes": ("bfloat16", 2),
        "places of the maxima (8 an output)": ("int64", 8 / 4),
    },
}
_SMALL = 1 / 50
"""A tensor of fewer bytes a neuron-step, such as one number a channel, is not listed."""


def saved(function: Callable[[], torch.Tensor], parameters: tuple[torch.Tensor, ...]) -> Counter[str]:
    """Bytes by dtype of what a forward pass keeps for its backward pass, each memory once, without the parameters."""
    found: dict[int, torch.Tensor] = {}
    packed: list[weakref.ref] = []
    pack = packing.pack

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def noted_pack(x: torch.Tensor, bits: int) -> torch.Tensor | None:
        data = pack(x, bits)
        if data is not None:
            packed.append(weakref.ref(data))
        return data

    packing.pack = noted_pack
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = function()
    finally:
        packing.pack = pack
    # A packed convolution has hooks of its own, which hide from ours what they keep: it is what still lives.
    for data in (reference() for reference in packed):
        if data is not None:
            keep(data)
    assert out.requires_grad
    for parameter in parameters:
        found.pop(parameter.untyped_storage()._cdata, None)
    sizes = Counter()
    for tensor in found.values():
        sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.untyped_storage().nbytes()
    return sizes


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """A convolution's output and a shortcut, (T N, C, H, W)."""
    shape = (T * N, C, SIDE, SIDE)
    y, shortcut = (torch.empty(shape, dtype=BF16, device="meta", requires_grad=True).clone() for _ in range(2))
    return tuple(t.contiguous(memory_format=torch.channels_last) for t in (y, shortcut))  # pyright: ignore


def _convolution() -> nn.Conv2d:
    return nn.Conv2d(C, C, 3, padding=1, bias=False, device="meta", dtype=BF16)


def ours() -> dict[str, Counter[str]]:
    """What this project's ops keep on the GPU path."""
    neuron = neurons.from_config(ModelConfig(T=T))
    bn, convolution, pool = nn.BatchNorm2d(C, device="meta"), _convolution(), nn.MaxPool2d(3, 2, 1)
    neurons.bind(nn.Sequential(bn, neuron))  # its counters go where BN is
    y, x = _inputs()
    with launches.noted():
        ops = {
            "neurons": lambda: neuron(y.unflatten(0, (T, -1))),
            "BN + neurons + shortcut": lambda: neuron.after_norm(y, bn, T, shortcut=x),
            "convolution of spikes": lambda: packing.conv2d(x, packing.Packed(x, 1), convolution),
            "convolution of sums to 15": lambda: packing.conv2d(x, packing.Packed(x, 4), convolution),
            "pooling 3 x 3, stride 2": lambda: packing.max_pool2d(x, pool),
        }
        return {name: saved(op, (*bn.parameters(), convolution.weight)) for name, op in ops.items()}


def peer() -> dict[str, Counter[str]]:
    """What SpikingJelly's ops keep. It is imported here: it is not installed everywhere."""
    from benchmarks.train_step_side import peer_packages

    functional, layer, neuron, surrogate, _ = peer_packages()
    shape, alike = surrogate.ATan(), {"detach_reset": True, "surrogate_function": surrogate.ATan()}
    node, bn = neuron.IFNode(**alike), layer.BatchNorm2d(C).to("meta")
    convolution, pool = _convolution(), nn.MaxPool2d(3, 2, 1)
    for module in (node, bn):
        functional.set_step_mode(module, "m")
    y, x = (t.contiguous().unflatten(0, (T, -1)) for t in _inputs())
    v = torch.zeros(y.shape[1:], device="meta")

    def plain(x: torch.Tensor) -> torch.Tensor:
        functional.reset_net(node)
        return node(x)

    def fused(x: torch.Tensor) -> torch.Tensor:
        return functional.if_multi_step(x, v, 1.0, 0.0, shape, True)[0]

    ops = {
        "neurons": lambda: plain(y),
        "neurons, fused": lambda: fused(y),
        "BN + neurons + shortcut": lambda: plain(bn(y)) + x,
        "BN + neurons + shortcut, fused": lambda: fused(bn(y)) + x,
        "convolution of spikes": lambda: convolution(x.flatten(0, 1)),
        "convolution of sums to 15": lambda: convolution(x.flatten(0, 1)),
        "pooling 3 x 3, stride 2": lambda: pool(x.flatten(0, 1)),
    }
    return {name: saved(op, (*bn.parameters(), convolution.weight)) for name, op in ops.items()}


def compared(expected: dict[str, Expected], counted: dict[str, Counter[str]]) -> dict[str, tuple[dict, dict]]:
    """By op: bytes a neuron-step by dtype, expected and counted."""
    steps = T * N * C * SIDE * SIDE
    found = {}
    for name, tensors in expected.items():
        by_dtype: Counter[str] = Counter()
        for dtype, size in tensors.values():
            by_dtype[dtype] += size  # pyright: ignore[reportArgumentType]
        sizes = {dtype: size / steps for dtype, size in counted[name].items() if size / steps > _SMALL}
        found[name] = dict(by_dtype), sizes
    return found


def markdown() -> list[str]:
    """The table of docs/snn.md."""
    rows = ["| kept for backward, bytes a neuron-step | here | SpikingJelly 2.0 |", "| --- | --- | --- |"]
    for name, tensors in PEER.items():
        cells = [
            " + ".join(f"{size:g} {what}" for what, (_, size) in side.items())
            for side in (OURS.get(name) or OURS[name.removesuffix(", fused")], tensors)
        ]
        rows.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    try:
        counts = ours(), peer()
    except ImportError as error:
        raise SystemExit(f"{error}; install spikingjelly==2.0.0 and triton") from None
    rows = []
    for side, expected, counted in (("ours", OURS, counts[0]), ("peer", PEER, counts[1])):
        for name, (by_dtype, sizes) in compared(expected, counted).items():
            rows += [
                table.row(f"{name}: {side}, expected", sum(by_dtype.values()), "bytes", None, "lower"),
                table.row("… counted", sum(sizes.values()), "bytes", None, "lower"),
            ]
    print(*markdown(), sep="\n")
    table.show(rows)
    if arguments.json:
        table.write(
            arguments.json,
            rows,
            hardware="none: counted on meta tensors",
            versions={"torch": torch.__version__, "spikingjelly": "2.0.0"},
            command="python -m benchmarks.retained --json benchmarks/results/retained.json",
            setting=f"IF, detached reset, bf16, T={T}, batch {N}, {C} x {SIDE} x {SIDE}; by neuron-step of the input",
            tensors={"ours": OURS, "peer": PEER},
        )


if __name__ == "__main__":
    main()
