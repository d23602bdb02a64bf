"""The χ-based pipeline: for every layer the narrowest surrogate that keeps its indicator at its target.

An integral controller in log-width, every `interval` steps on the mean indicator since the last decision:

    log w_ℓ += η (target - indicator_ℓ),   w_min ≤ w_ℓ ≤ w_max

Coverage answers a change of ln w by at most 0.48 (a centred Gaussian potential), so η = 0.5 is a loop gain of 0.24 at
most: it settles without ringing. Everything is a pure function of tensors on the training device: no host read.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import ChiConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ControllerState:
    """What the controller remembers between steps; it is saved with every checkpoint."""

    log_width: Tensor
    """`(L,)` float64, ln w_ℓ."""
    total: Tensor
    """`(L,)` float64, sum of the indicator since the last decision."""
    count: int
    """Steps in `total`."""

    @property
    def widths(self) -> Tensor:
        """`(L,)` float32, w_ℓ."""
        return self.log_width.exp().float()

    def to_dict(self) -> dict:
        return {"log_width": self.log_width.cpu(), "total": self.total.cpu(), "count": self.count}

    @classmethod
    def from_dict(cls, state: dict, device: torch.device) -> "ControllerState":
        return cls(log_width=state["log_width"].to(device), total=state["total"].to(device), count=int(state["count"]))


def start(num_layers: int, width: float, device: torch.device) -> ControllerState:
    """The state before the first step, all `num_layers` widths at `width`."""
    log_width = torch.full((num_layers,), math.log(width), dtype=torch.float64, device=device)
    return ControllerState(log_width=log_width, total=torch.zeros_like(log_width), count=0)


def target_at(config: ChiConfig, progress: float) -> float:
    """The target at `progress` in [0, 1] of the run: linear from `target` to `target_end`."""
    return config.target + (config.target_end - config.target) * progress


def steer(config: ChiConfig, state: ControllerState, indicator: Tensor, progress: float) -> ControllerState:
    """The state after a step that measured `indicator` `(L,)`; widths move on every `interval`-th step.

    An indicator that is not finite leaves its layer's width where it is.
    """
    total, count = state.total + indicator, state.count + 1
    if config.policy == "fixed":
        return state
    if count < config.interval:
        return ControllerState(log_width=state.log_width, total=total, count=count)
    error = target_at(config, progress) - total / count
    moved = state.log_width + config.eta * torch.nan_to_num(error, nan=0.0, posinf=0.0, neginf=0.0)
    log_width = moved.clamp(math.log(config.width_min), math.log(config.width_max))
    return ControllerState(log_width=log_width, total=torch.zeros_like(total), count=0)
