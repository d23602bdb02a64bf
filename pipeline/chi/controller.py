"""The χ controller: gives every layer the surrogate width that keeps its indicator at its target.

An integral controller in log-width, every `interval` steps on the mean indicator since the last decision:

    log w_ℓ += η (log r(target_ℓ) - log r(coverage_ℓ)),   w_min ≤ w_ℓ ≤ w_max

r(p) is the half-width, in standard deviations, that holds a share p of a centred Gaussian. If the potential is such a
Gaussian, r is w over its spread, and one decision goes a share η of the distance (in log w) to the right width: with
η = 0.5 a width that is off by a factor of 8 is off by 9 % after five decisions. A potential whose mean lies below the
threshold has a higher loop gain, up to 1.5 times at the targets in use; the loop is then still far from oscillating.
Other indicators have no such law, and steer by log w_ℓ += η (target_ℓ - indicator_ℓ). One decision at most doubles or
halves a width. A layer whose coverage or firing rate is below its floor gets almost no gradient: every decision widens
it by at least a quarter until it is above the floor, whatever the indicator says. Everything is a pure function of
tensors on the training device: no host read. The other policies are in policies.py.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.chi import policies
from pipeline.chi.policies import Evidence
from pipeline.config import ChiConfig

MAX_STEP = math.log(2)
"""Largest change of ln w at a decision."""
FLOOR_STEP = math.log(1.25)
"""Least change of ln w at a decision on a layer below its floor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ControllerState:
    """What the controller remembers between steps; it is saved with every checkpoint."""

    start: Tensor
    """`(L,)` float64, ln w_ℓ at the start of the run, which a schedule begins from."""
    log_width: Tensor
    """`(L,)` float64, ln w_ℓ."""
    total: Tensor
    """`(3, L)` float64, sums of indicator, coverage and firing rate since the last decision, of the steps that have
    them: a layer may get no gradient in a step."""
    read: Tensor
    """`(3, L)` float64, number of terms in `total`."""
    count: int
    """Steps since the last decision."""

    @property
    def widths(self) -> Tensor:
        """`(L,)` float32, w_ℓ."""
        return self.log_width.exp().float()

    def state_dict(self) -> dict:
        tensors = {name: getattr(self, name).cpu() for name in ("start", "log_width", "total", "read")}
        return {**tensors, "count": self.count}

    @classmethod
    def from_state_dict(cls, state: dict, device: torch.device) -> "ControllerState":
        tensors = {name: state[name].to(device) for name in ("start", "log_width", "total")}
        count = int(state["count"])
        # Older states have no `read`: then every step had every term.
        read = state["read"].to(device) if "read" in state else torch.full_like(tensors["total"], count)
        return cls(**tensors, read=read, count=count)


def start(widths: Tensor) -> ControllerState:
    """The state before the first step, from the layers' first `widths` `(L,)`."""
    log_width = widths.double().log()
    nothing = log_width.new_zeros(3, len(widths))
    return ControllerState(start=log_width, log_width=log_width, total=nothing, read=nothing, count=0)


def targets_at(config: ChiConfig, progress: float, like: Tensor) -> Tensor:
    """`(L,)` float64, every layer's target at `progress` in [0, 1] of the run; on the device of `like`, also `(L,)`.

    Linear in the run from `target` to `target_end`, and in depth by `target_slope` around that.
    """
    level = config.target + (config.target_end - config.target) * progress
    depth = torch.arange(len(like), dtype=torch.float64, device=like.device) / max(len(like) - 1, 1)
    return level + config.target_slope * (depth - 0.5)


def steer(
    config: ChiConfig, state: ControllerState, evidence: Evidence | None, progress: float
) -> tuple[ControllerState, Evidence | None]:
    """The state after a step that measured `evidence`; and, on every `interval`-th step, the means it decided on.

    A step that measured nothing (None: its update was skipped) does not count.
    """
    if evidence is None:
        return state, None
    terms = torch.stack((evidence.indicator, evidence.coverage, evidence.firing_rate))
    has = terms.isfinite()
    total = state.total + torch.where(has, terms, 0.0)
    state = replace(state, total=total, read=state.read + has, count=state.count + 1)
    if config.policy == "fixed" or state.count < config.interval:
        return state, None
    indicator, coverage, firing_rate = state.total / state.read  # NaN where there was none
    mean = Evidence(indicator=indicator, coverage=coverage, firing_rate=firing_rate, spread=evidence.spread)
    log_width = decide(config, state.start, state.log_width, mean, progress)
    return replace(
        state, log_width=log_width, total=torch.zeros_like(total), read=torch.zeros_like(total), count=0
    ), mean


def decide(config: ChiConfig, start: Tensor, log_width: Tensor, mean: Evidence, progress: float) -> Tensor:
    """ln w `(L,)` after a decision on `mean`. A result that is not finite leaves the width of its layer as it is."""
    policy = _hold if config.policy == "chi" else policies.TABLE[config.policy]
    moved = policy(config, start, log_width, mean, progress)
    moved = torch.where(torch.isfinite(moved), moved, log_width)
    return moved.clamp(math.log(config.width_min), math.log(config.width_max))


def starved(config: ChiConfig, mean: Evidence) -> Tensor:
    """`(L,)` bool: layers below a floor."""
    return (mean.coverage < config.floor_coverage) | (mean.firing_rate < config.floor_rate)


def _hold(config: ChiConfig, start: Tensor, log_width: Tensor, mean: Evidence, progress: float) -> Tensor:
    target, indicator = targets_at(config, progress, log_width), mean.indicator
    gap = _reach(target).log() - _reach(indicator).log() if config.indicator == "coverage" else target - indicator
    change = torch.where(indicator.isfinite(), config.eta * gap, 0.0).clamp(-MAX_STEP, MAX_STEP)
    return log_width + torch.where(starved(config, mean), change.clamp_min(FLOOR_STEP), change)


def _reach(coverage: Tensor) -> Tensor:
    """r of a coverage, clamped to [0.001, 0.999]."""
    return math.sqrt(2) * torch.erfinv(coverage.clamp(1e-3, 1 - 1e-3))
