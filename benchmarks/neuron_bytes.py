"""Bytes per neuron-step that a spiking layer moves and keeps, against SpikingJelly 2.0, on the CPU in bf16.

    python -m benchmarks.neuron_bytes [--quick] [--json FILE] [--peer PYTHON]

Kept: the bytes in graph and modules after a forward pass, when its inputs and output are freed, by torch's allocator.
Moved: processor seconds of a forward and backward pass on one thread, times the rate of a copy in the same round: the
bytes that a copy would have moved in that time. So arithmetic that is slower than memory counts too. Counted figures
come from reading the code. The peer's are those of its fused GPU kernel, which does not run here: on the CPU the peer
runs plain torch operations. Each side has its own process; their rounds alternate.
"""

import argparse
import os
import statistics
import sys

from benchmarks import table
from benchmarks.side import Side, peer_python

SIDES = ("peer", "ours", "ours, checkpoint")
OPS = ("neurons", "BN + neurons + shortcut")
COUNTED = {
    # x 2, s 2; x 2, grad s 2, grad x 2.   Peer: x 2, v 4/T, s 2, v 4/T, h 4; grad s 2, h 4, grad v 4/T, grad x 2, 4/T.
    "neurons": {"ours": (10, 2), "peer": (20, 7)},
    # Statistics 2; y 2, shortcut 2, out 2; y 2, grad 2, grad x 2; y 2, grad x 2, grad y 2.
    # Peer: statistics 2, y 2, x 2; neurons 20; s 2, shortcut 2, out 2; sums y 2, grad 2; y 2, grad 2, grad y 2.
    "BN + neurons + shortcut": {"ours": (20, 2), "peer": (42, 9)},
}
"""Bytes moved and kept per neuron-step, in bf16 at T = 4, counted from the code; kept tensor by tensor: retained.py."""


def measure(arguments: argparse.Namespace, shape: dict) -> tuple[dict[str, dict], dict[str, list[dict]], str]:
    """By side: bytes kept by each op, and the times of every round. Then torch's version."""
    sides: dict[str, Side] = {}
    peer = peer_python(arguments.peer)
    try:
        for name in SIDES:
            python = peer if name == "peer" else sys.executable
            # Without this every large tensor would get new pages, and the time would include their page faults.
            memory = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
            sides[name] = Side(python, "neuron_bytes_side.py", {**shape, "side": name}, memory)
        kept = {name: sides[name].ask("kept") for name in SIDES}
        rounds = {name: [] for name in SIDES[:2]}
        for _ in range(1 + arguments.rounds):
            for name, answers in rounds.items():
                answers.append(sides[name].ask("times"))
    finally:
        for side in sides.values():
            side.close()
    return kept, {name: answers[1:] for name, answers in rounds.items()}, sides["ours"].torch


def rows(kept: dict[str, dict], rounds: dict[str, list[dict]], neuron_steps: int) -> list[dict]:
    """The table: every figure in bytes per neuron-step, and the ratios of ours to the peer's."""
    found = []
    for op in OPS:
        by_copy = {
            name: statistics.median(answer[op] * answer["copy"] for answer in answers) / neuron_steps
            for name, answers in rounds.items()
        }
        by_allocator = {name: kept[name][op] / neuron_steps for name in rounds}
        for index, (what, measured) in enumerate((("moved", by_copy), ("kept", by_allocator))):
            ours, peer = (COUNTED[op][name][index] for name in ("ours", "peer"))
            found += [
                table.row(f"{op}: {what}, ours", measured["ours"], "bytes", None, "lower"),
                table.row("… counted", ours, "bytes", None, "lower"),
                table.row(f"{op}: {what}, peer", measured["peer"], "bytes", None, "lower"),
                table.row("… counted", peer, "bytes", None, "lower"),
                table.row(
                    f"{op}: {what}, ratio to the peer", measured["ours"] / measured["peer"], "ratio", None, "lower"
                ),
                table.row("… counted", ours / peer, "ratio", None, "lower"),
            ]
    # A basic block has two layers of neurons.
    found += [
        table.row(f"residual block: kept, {name}", kept[name]["block"] / (2 * neuron_steps), "bytes", None, "lower")
        for name in ("ours, checkpoint", "ours", "peer")
    ]
    copies = [answer["copy"] for answers in rounds.values() for answer in answers]
    return [*found, table.row("copy on one thread, read and written", statistics.median(copies), "bytes/s")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="2 rounds of a quarter of the batch instead of 9")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--peer", metavar="PYTHON", help="a Python that has torch and spikingjelly 2.0.0")
    arguments = parser.parse_args()
    arguments.rounds = 2 if arguments.quick else 9
    shape = {"T": 4, "N": 4 if arguments.quick else 16, "C": 64, "size": 56}
    kept, rounds, torch_version = measure(arguments, shape)
    lines = rows(kept, rounds, shape["T"] * shape["N"] * shape["C"] * shape["size"] ** 2)
    table.show(lines)
    if arguments.json:
        table.write(
            arguments.json,
            lines,
            hardware=f"{table.processor()}, one thread of {os.cpu_count()} cores; no GPU was at hand",
            versions={"torch": torch_version, "spikingjelly": "2.0.0"},
            command="python -m benchmarks.neuron_bytes" + (" --quick" if arguments.quick else ""),
            setting=f"IF, atan, detached reset, bf16, T={shape['T']}, batch {shape['N']}, 64 x 56 x 56; by neuron-step",
            kept_bytes=kept,
            rounds=rounds,
        )


if __name__ == "__main__":
    main()
