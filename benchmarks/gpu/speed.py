"""SEW-ResNet34's training step against SpikingJelly 2.0's with its best backend, in turns; what χ adds; launches."""

import os
import statistics
import sys
import threading

import torch

from benchmarks.gpu.findings import Findings
from benchmarks.side import Side

ROUNDS, STEPS = 5, 3
BACKENDS = ("cuda", "triton", "torch")
"""Implementations of its IF neuron that SpikingJelly 2 has for GPUs; on the CPU it has one."""
BACKEND_VARIABLE = "SJ_IF_CUDA_IMPLEMENTATION"
EAGER, GRAPH = "ours", "ours, graph"
PLAIN, STEERED = "ours, no χ", "ours, χ"
"""Both with the triangle surrogate, which χ needs; the others with ATan, as the peer."""
SPEED_GOAL, MEMORY_GOAL, CHI_GOAL_PERCENT = 2.0, 0.4, 1.0
ANSWER_S = 120.0
"""A side that is silent for so long is ended: compiling, or choosing convolutions, takes some 30 s."""


class Trainer(Side):
    """A side that says why it failed instead of ending the others."""

    def __init__(self, python: str, job: dict) -> None:
        self.failed, self.version = "", ""
        self.turns: list[dict] = []
        # The kernels are checked by other steps; here the interpreter would only be slow.
        variables = {"CHISPIKE_TEST_INTERPRETER": "0", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        if job.get("backend"):
            variables[BACKEND_VARIABLE] = job["backend"]
        super().__init__(python, "gpu/step_side.py", job, variables)

    def ask(self, question: object) -> dict:
        silent = threading.Timer(ANSWER_S, self.process.kill)
        silent.start()
        try:
            answer = super().ask(question)
        except (SystemExit, OSError, ValueError) as error:  # the process has ended, maybe within a line
            answer = {"failed": f"{error}"[:300] if silent.is_alive() else f"no answer within {ANSWER_S:.0f} s"}
        finally:
            silent.cancel()
        self.failed = answer.get("failed", self.failed)
        self.version = answer.get("version", self.version)
        return {"torch": "", **answer}

    def turn(self, steps: int) -> None:
        if self.failed:
            return
        answer = self.ask(steps)
        if not self.failed:
            self.turns.append(answer)

    def most(self, part: str) -> float | None:
        """The largest value of all turns; None where it was not measured."""
        values = [turn[part] for turn in self.turns if part in turn]
        return max(values) if values else None


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
    found, why = [], []
    for backend in ("torch",) if findings.simulated else BACKENDS:
        for channels_last in (False,) if findings.simulated else (False, True):
            chosen = {"side": "peer", "backend": backend, "channels_last": channels_last, "python": python}
            try:
                side = Trainer(python, {**base, **chosen, "batch": 2 if findings.simulated else 64, "dtype": "bf16"})
            except OSError as error:
                findings.absent("SpikingJelly", f"{python}: {error.strerror}")
                return None
            side.turn(1)
            side.turn(1)
            side.close()
            if side.failed:
                why.append(f"{backend}: {side.failed}")
            else:
                found.append((side.turns[-1]["seconds"], side.version, chosen))
    for said in dict.fromkeys(why):
        findings.absent("SpikingJelly" if not found else "one of SpikingJelly's backends", said)
    if not found:
        return None
    _, version, best = min(found, key=lambda each: each[0])
    form = "channels-last" if best["channels_last"] else "contiguous"
    said = f"SpikingJelly {version}, backend {best['backend']}, {form}"
    findings.facts(peer=said)
    findings.check("the peer is SpikingJelly 2", version.startswith("2."), said)
    return best


def compare(findings: Findings, base: dict, peer: dict | None) -> None:
    """All sides of one batch and precision take turns."""
    names = [EAGER, GRAPH] + ([PLAIN, STEERED] if base["dtype"] == "bf16" else [])
    sides: dict[str, Trainer] = {}
    try:
        for side in names:
            surrogate = "triangle" if side in (PLAIN, STEERED) else "atan"
            sides[side] = Trainer(sys.executable, {**base, "side": side, "surrogate": surrogate})
        if peer is not None:
            sides["peer"] = Trainer(peer["python"], {**base, **peer})
        rounds, steps = (1, 1) if findings.simulated else (ROUNDS, STEPS)
        for _ in range(rounds):
            for side in sides.values():
                side.turn(steps)
        report(findings, f"batch {base['batch']}, {base['dtype']}", sides)
    finally:
        for side in sides.values():
            side.close()


def report(findings: Findings, name: str, sides: dict[str, Trainer]) -> None:
    """Figures of the sides that ran; a failure of ours is one of the step, unless the memory is too small."""
    for kind, side in sides.items():
        if not side.failed:
            figures_of(findings, f"{name}, {kind}", side)
        elif kind == "peer" or "OutOfMemory" in side.failed:
            findings.absent(f"{name}, {kind}", side.failed)
        else:
            findings.check(f"{name}, {kind}: the step runs", False, side.failed)
    ran = {kind: side for kind, side in sides.items() if not side.failed}
    for kind in (EAGER, GRAPH):
        if kind in ran and "peer" in ran:
            against(findings, f"{name}, {kind}", ran[kind], ran["peer"])
    if PLAIN in ran and STEERED in ran:
        cost = 100 * (ratio(ran[STEERED], ran[PLAIN]) - 1)
        findings.figure(f"{name}, cost of χ", cost, "%", CHI_GOAL_PERCENT, "lower")


def figures_of(findings: Findings, name: str, side: Trainer) -> None:
    findings.figure(name, statistics.median(turn["images_per_s"] for turn in side.turns), "images/s")
    for part in ("allocated", "reserved"):
        most = side.most(f"{part}_bytes")
        findings.figure(f"{name}, peak memory {part}", most and most / 1e9, "GB", None, "lower")
    findings.figure(f"{name}, launches a step", side.ask("launches").get("launches"), "launches")


def against(findings: Findings, name: str, ours: Trainer, peer: Trainer) -> None:
    """The two goals against the peer."""
    findings.figure(f"{name}, speed to the peer's", ratio(peer, ours), "ratio", SPEED_GOAL)
    for part in ("allocated", "reserved"):
        mine, theirs = ours.most(f"{part}_bytes"), peer.most(f"{part}_bytes")
        share = mine / theirs if mine and theirs else None
        findings.figure(f"{name}, memory {part} to the peer's", share, "ratio", MEMORY_GOAL, "lower")


def ratio(one: Trainer, other: Trainer) -> float:
    """Median of the ratios of the seconds of neighbouring turns."""
    pairs = zip(one.turns, other.turns, strict=True)
    return statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)
