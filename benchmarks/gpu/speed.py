"""SEW-ResNet34's training step against SpikingJelly 2.0's with its best backend, in turns; what χ adds; launches."""

import statistics
import sys

import torch

from benchmarks.gpu.findings import Findings
from benchmarks.side import Side
from pipeline.config import TrainConfig

ROUNDS, STEPS = 5, 3
BACKENDS = ("triton", "cupy", "torch")
NO_GRAPH = "train.cuda_graph is no option of this version"


class Trainer(Side):
    """A side that says why it failed instead of ending the others."""

    def __init__(self, python: str, job: dict) -> None:
        self.failed = ""
        self.turns: list[dict] = []
        super().__init__(python, "gpu/step_side.py", job)

    def ask(self, question: object) -> dict:
        try:
            answer = super().ask(question)
        except (SystemExit, OSError) as error:  # the process has ended
            answer = {"torch": "", "failed": str(error)[:300]}
        self.failed = answer.get("failed", self.failed)
        return answer

    def turn(self, steps: int) -> None:
        answer = self.ask(steps)
        if not self.failed:
            self.turns.append(answer)


def speed(findings: Findings, device: torch.device) -> None:
    """Each batch and precision; the peer is the fastest of its backends and memory formats at the first of them."""
    toy = {"arch": "sew_resnet18", "size": 32}
    whole = {"arch": "sew_resnet34", "size": 224}
    base = {**(toy if findings.simulated else whole), "T": 4, "device": device.type}
    peer = best_peer(findings, base)
    for batch in (2,) if findings.simulated else (64, 256):
        for dtype in ("bf16",) if findings.simulated else ("bf16", "fp16"):
            compare(findings, {**base, "batch": batch, "dtype": dtype}, peer)


def best_peer(findings: Findings, base: dict) -> dict | None:
    """Backend and memory format of the fastest peer; None where there is none."""
    python = findings.options.get("peer") or sys.executable
    best, why = None, []
    for backend in ("torch",) if findings.simulated else BACKENDS:
        for channels_last in (False, True):
            if findings.simulated and channels_last:
                continue
            chosen = {"side": "peer", "backend": backend, "channels_last": channels_last, "python": python}
            side = Trainer(python, {**base, **chosen, "batch": 2 if findings.simulated else 64, "dtype": "bf16"})
            for _ in range(2):
                if not side.failed:
                    side.turn(1)
            side.close()
            if side.failed:
                why.append(f"{backend}: {side.failed}")
            elif best is None or side.turns[-1]["seconds"] < best[0]:
                best = side.turns[-1]["seconds"], chosen
    if best is None:
        findings.absent("SpikingJelly", "; ".join(dict.fromkeys(why))[:600])
        return None
    form = "channels-last" if best[1]["channels_last"] else "contiguous"
    findings.check("a peer to compare with", True, f"SpikingJelly, backend {best[1]['backend']}, {form}")
    return best[1]


def compare(findings: Findings, base: dict, peer: dict | None) -> None:
    """All sides of one batch and precision take turns."""
    name = f"batch {base['batch']}, {base['dtype']}"
    names = ["ours"]
    if "cuda_graph" in TrainConfig.__dataclass_fields__ and not findings.simulated:
        names.append("ours, graph")
    else:
        findings.absent(f"{name}, CUDA graph", "there is no GPU" if findings.simulated else NO_GRAPH)
    if base["dtype"] == "bf16":
        names += ["ours, not counting", "ours, attached"]
    sides: dict[str, Trainer] = {}
    try:
        for side in names:
            sides[side] = Trainer(sys.executable, {**base, "side": side})
        if peer is not None:
            sides["peer"] = Trainer(peer["python"], {**base, **peer})
        rounds, steps = (1, 1) if findings.simulated else (ROUNDS, STEPS)
        for _ in range(rounds):
            for side in sides.values():
                if not side.failed:
                    side.turn(steps)
        report(findings, name, sides)
    finally:
        for side in sides.values():
            side.close()


def report(findings: Findings, name: str, sides: dict[str, Trainer]) -> None:
    for kind, side in sides.items():
        if side.failed:
            findings.absent(f"{name}, {kind}", side.failed)
            if kind == "ours" and "OutOfMemory" not in side.failed:
                findings.check(f"{name}: our step runs", False, side.failed)
            continue
        findings.figure(f"{name}, {kind}", median(side, "images_per_s"), "images/s")
        for part in ("allocated", "reserved"):
            if f"{part}_bytes" in side.turns[0] or findings.simulated:
                largest = max(turn.get(f"{part}_bytes", 0) for turn in side.turns)
                findings.figure(f"{name}, {kind}, peak memory {part}", largest / 1e9, "GB", None, "lower")
    ours, peer = sides["ours"], sides.get("peer")
    if peer is not None and not peer.failed:
        for kind in ("ours", "ours, graph"):
            if kind in sides and not sides[kind].failed:
                findings.figure(f"{name}, {kind}, speed to the peer's", ratio(peer, sides[kind]), "ratio", 2.0)
                for part in ("allocated", "reserved"):
                    if f"{part}_bytes" in peer.turns[0] or findings.simulated:
                        ours_most, theirs_most = (
                            max(turn.get(f"{part}_bytes", 1) for turn in side.turns) for side in (sides[kind], peer)
                        )
                        findings.figure(
                            f"{name}, {kind}, memory {part} to the peer's", ours_most / theirs_most, "ratio", 0.4, "lower"
                        )
    if ours.failed:
        return
    plain = sides.get("ours, not counting")
    if plain is not None and not plain.failed:
        findings.figure(f"{name}, cost of counting", 100 * (ratio(ours, plain) - 1), "%", 1.0, "lower")
        attached = sides["ours, attached"]
        if not attached.failed:
            findings.figure(f"{name}, cost of χ, by chi.attach", 100 * (ratio(attached, plain) - 1), "%", 1.0, "lower")
    for kind, side in sides.items():
        if not side.failed:
            answer = side.ask("launches")
            if "launches" in answer:
                findings.figure(f"{name}, {kind}, launches a step", answer["launches"], "launches")


def median(side: Trainer, part: str) -> float:
    return statistics.median(turn[part] for turn in side.turns)


def ratio(one: Trainer, other: Trainer) -> float:
    """Median of the ratios of the seconds of neighbouring turns."""
    pairs = zip(one.turns, other.turns, strict=False)
    return statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)
