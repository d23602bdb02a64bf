"""Checks of the control from a run's journal: a replay of every decision, and layers that do not respond.

A decision's record holds the means that it was made on and the resulting ln w, at full precision:
`{"step", "decision_progress", "decision_indicator", "decision_coverage", "decision_firing_rate", "decision_spread",
"decision_log_width"}`; the record of step 0 holds only the starting widths.
"""

import itertools
import math
from collections.abc import Sequence

import torch

from pipeline.chi.controller import decide, starved
from pipeline.chi.policies import Evidence
from pipeline.chi.widths import Decision
from pipeline.config import ChiConfig

LOOK_BACK = 20
"""Number of last decisions that a finding is based on."""
MOVED, ANSWERED = math.log(2), 0.02
"""If ln w moved by MOVED, the indicator must have moved by ANSWERED; else the layer does not answer."""


def record_of(decision: Decision) -> dict:
    """A decision as journal fields; reads the device."""
    evidence = decision.evidence
    return {
        "decision_progress": decision.progress,
        "decision_indicator": evidence.indicator.tolist(),
        "decision_coverage": evidence.coverage.tolist(),
        "decision_firing_rate": evidence.firing_rate.tolist(),
        "decision_spread": None if evidence.spread is None else evidence.spread.tolist(),
        "decision_log_width": decision.log_width.tolist(),
    }


def decisions_of(journal: Sequence[dict]) -> list[dict]:
    return [record for record in journal if "decision_log_width" in record]


def evidence_of(record: dict) -> Evidence:
    def vector(name: str) -> torch.Tensor:
        values = record[f"decision_{name}"]
        return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)

    spread = None if record["decision_spread"] is None else vector("spread")
    return Evidence(
        indicator=vector("indicator"), coverage=vector("coverage"), firing_rate=vector("firing_rate"), spread=spread
    )


def replay(config: ChiConfig, journal: Sequence[dict]) -> list[tuple[int, list[float], list[float]]]:
    """Every decision made again from its own evidence: `(step, w as journalled, w as decided now)`."""
    records = decisions_of(journal)
    start = torch.tensor(records[0]["decision_log_width"], dtype=torch.float64) if records else torch.empty(0)
    steps = []
    for before, record in itertools.pairwise(records):
        log_width = torch.tensor(before["decision_log_width"], dtype=torch.float64)
        again = decide(config, start, log_width, evidence_of(record), record["decision_progress"])
        recorded = torch.tensor(record["decision_log_width"], dtype=torch.float64)
        steps.append((record["step"], recorded.exp().tolist(), again.exp().tolist()))
    return steps


def findings(config: ChiConfig, layers: Sequence[str], journal: Sequence[dict]) -> list[str]:
    """One line for each layer that is below its floor, is at a width limit, or whose indicator ignores its width."""
    records = [record for record in decisions_of(journal) if "decision_indicator" in record]
    if not records:
        return []
    below = torch.stack([starved(config, evidence_of(record)) for record in records])
    recent = records[-LOOK_BACK:]
    widths = torch.tensor([record["decision_log_width"] for record in recent], dtype=torch.float64)
    indicators = torch.stack([evidence_of(record).indicator for record in recent])
    lowest, highest = math.log(config.width_min), math.log(config.width_max)
    lines = []
    for layer, name in enumerate(layers):
        if below[-1, layer]:
            times = f"{int(below[:, layer].sum())} of {len(records)}"
            lines.append(f"{name}: below its floor in {times} decisions, and still is; "
                         "where its input is silent, widening it cannot help")  # fmt: skip
        elif below[:, layer].any():
            last = records[int(below[:, layer].nonzero().max())]["step"]
            lines.append(f"{name}: fell below its floor, was widened, and is above it since step {last}")
        course, answer = widths[:, layer], indicators[:, layer]
        for limit, word in ((lowest, "narrowest"), (highest, "widest")):
            if len(recent) == LOOK_BACK and bool((course == limit).all()):
                lines.append(f"{name}: at the {word} width allowed, {math.exp(limit):.3g}, for {LOOK_BACK} decisions")
        if config.policy == "chi" and course.max() - course.min() > MOVED and answer.max() - answer.min() < ANSWERED:
            factor, change = math.exp(course.max() - course.min()), answer.max() - answer.min()
            lines.append(f"{name}: its width moved by a factor of {factor:.1f} and its {config.indicator} by only "
                         f"{change:.3f}; it does not answer")  # fmt: skip
    return lines
