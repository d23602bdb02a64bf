"""The policies beside χ control that set widths: a schedule and two published rivals, behind one interface.

A policy is `(config, start, log_width, evidence, progress) -> log_width`, pure, on `(L,)` float64 tensors (`start` is
ln w before the first step), called at every decision. controller.py clamps its result, and keeps a layer's width where
the result is not finite.

    schedule   log w from the layer's first width to `width_end`, linear in the position in the run
    mpd_agl    w = √(1 + λ²) γ̄ v_th       λ: share of the potential kept per step (IF: 1, LIF: 1 - 1/τ); γ̄: mean |γ| of
               the batch normalisation in front. If x ~ N(0, (γ v_th)²), w is the potential's deviation at t = 2
    ds_atgo    w = √E[(h - v_th)²], averaged exponentially over decisions

Sources: Jiang et al., "Adaptive Gradient Learning for Spiking Neural Networks by Exploiting Membrane Potential
Dynamics", IJCAI 2025 (mpd_agl; its rectangle is 2w wide); Jiang et al., "DS-ATGO: Dual-Stage Synergistic Learning via
Forward Adaptive Threshold and Backward Gradient Optimization for Spiking Neural Networks", 2025 (ds_atgo: our form of
its backward part, a width from mean and variance of the potential; its adaptive threshold is not implemented).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pipeline.config import ChiConfig

DS_ATGO_MEMORY = 0.9
"""Weight of the old width in the exponential mean of ds_atgo."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What one optimizer step measured, or the mean over the steps of a decision: `(L,)` float64 tensors."""

    indicator: Tensor
    """The indicator that `chi.indicator` names."""
    coverage: Tensor
    """NaN where the surrogate has unbounded support."""
    firing_rate: Tensor
    spread: Tensor | None = None
    """Spread of the potential, last step: √(1 + λ²) γ̄ v_th for mpd_agl, √E[(h - v_th)²] for ds_atgo; else None."""


def schedule(config: ChiConfig, start: Tensor, log_width: Tensor, evidence: Evidence, progress: float) -> Tensor:
    return start + (math.log(config.width_end) - start) * progress


def mpd_agl(config: ChiConfig, start: Tensor, log_width: Tensor, evidence: Evidence, progress: float) -> Tensor:
    assert evidence.spread is not None
    return evidence.spread.log()


def ds_atgo(config: ChiConfig, start: Tensor, log_width: Tensor, evidence: Evidence, progress: float) -> Tensor:
    assert evidence.spread is not None
    return (DS_ATGO_MEMORY * log_width.exp() + (1 - DS_ATGO_MEMORY) * evidence.spread).log()


TABLE: dict[str, Callable[[ChiConfig, Tensor, Tensor, Evidence, float], Tensor]] = {
    "schedule": schedule,
    "mpd_agl": mpd_agl,
    "ds_atgo": ds_atgo,
}
