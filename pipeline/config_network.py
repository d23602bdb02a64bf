"""The network and what steers its surrogates: two sections of a `Config`. See config.py."""

import math
from dataclasses import dataclass

from pipeline.config_checks import checked, one_of, positive, require


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    arch: str = "sew_tiny"
    """Name of the network: sew_tiny; sew_cifar with 8, 20, 26, 32 or 56 behind it, for small images; sew_resnet with
    18, 34, 50, 101 or 152."""
    T: int = 4
    """Time steps, at least 1."""
    connect: str = "add"
    """How a block joins its residual: add, and, iand."""
    neuron: str = "if"
    """Neuron model: if, lif, plif (lif whose tau is learned, one for each layer)."""
    tau: float = 2.0
    """Membrane time constant of lif, in time steps, at least 1; plif starts from it and needs more than 1."""
    v_th: float = 1.0
    """Firing threshold, above 0."""
    reset: str = "hard"
    """What a spike does to the potential: hard sets it to 0, soft subtracts v_th."""
    detach_reset: bool = True
    """No gradient flows through a spike's reset of the potential."""
    zero_init_residual: bool = False
    """Start every block as its shortcut: the last batch normalisation of its branch begins at 0."""
    surrogate: str = "triangle"
    """Shape of the surrogate gradient: triangle, rectangle, atan, sigmoid."""
    scale: str = "area"
    """Normalisation of the surrogate: area (integral 1), peak (maximum 1), rms (area with a steered amplitude)."""
    width: float = 1.0
    """Half-width of the surrogate at the start, in units of the potential, above 0."""
    checkpoint: bool = False
    """Compute convolutions again in the backward pass instead of keeping their outputs: slower, far less memory."""

    def __post_init__(self) -> None:
        checked("model.", self)

    def check(self) -> None:
        """The section's own rules; raises ConfigError."""
        require(self.T >= 1, "model.T", self.T, "an integer of at least 1")
        one_of("model.connect", self.connect, ("add", "and", "iand"))
        one_of("model.neuron", self.neuron, ("if", "lif", "plif"))
        one_of("model.reset", self.reset, ("hard", "soft"))
        one_of("model.surrogate", self.surrogate, ("triangle", "rectangle", "atan", "sigmoid"))
        one_of("model.scale", self.scale, ("area", "peak", "rms"))
        require(math.isfinite(self.tau) and self.tau >= 1, "model.tau", self.tau, "a number of at least 1, and finite")
        require(self.neuron != "plif" or self.tau > 1, "model.tau", self.tau, "a number above 1 with model.neuron plif")
        positive("model.v_th", self.v_th)
        positive("model.width", self.width)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChiConfig:
    policy: str = "chi"
    """Who sets the widths: fixed leaves them, schedule goes from model.width to width_end, chi holds every layer's
    indicator at its target; mpd_agl and ds_atgo are published rivals, see chi/policies.py."""
    indicator: str = "coverage"
    """What chi holds at the target: coverage, participation, chi, firing_rate."""
    target: float = 0.5
    """Target at the start of training, in (0, 1)."""
    target_end: float = 0.3
    """Target at the end; between the two it moves linearly with the position in the run."""
    target_slope: float = 0.0
    """Added to the target from the first layer (half of it below) to the last (half of it above), in (-1, 1)."""
    width_end: float = 0.5
    """Width at the end under policy schedule, in units of the potential; log-linear from model.width."""
    eta: float = 0.5
    """Gain of the controller, above 0: the share of the distance to its target, in log w, that a coverage goes in one
    decision; of other indicators log w += eta (target - indicator)."""
    interval: int = 10
    """Optimizer steps between two decisions, at least 1."""
    floor_coverage: float = 0.01
    """A layer whose coverage falls below this is widened whatever its indicator says; in [0, 1), 0 is off."""
    floor_rate: float = 0.001
    """The same for its firing rate; in [0, 1), 0 is off."""
    width_min: float = 0.05
    """Narrowest width, above 0."""
    width_max: float = 8.0
    """Widest width."""
    calibrate: bool = False
    """Start chi from widths that put the first batch's coverage at the target, instead of from model.width. Widths
    that init_from brings along come first."""
    self_check: bool = True
    """Compare the first χ with DeepSpeed's own full gradient and refuse to run where they differ."""

    def __post_init__(self) -> None:
        checked("chi.", self)

    def check(self) -> None:
        """The section's own rules; raises ConfigError."""
        one_of("chi.policy", self.policy, ("fixed", "schedule", "chi", "mpd_agl", "ds_atgo"))
        one_of("chi.indicator", self.indicator, ("coverage", "participation", "chi", "firing_rate"))
        for name in ("target", "target_end"):
            got = getattr(self, name)
            require(0 < got < 1, f"chi.{name}", got, "a number between 0 and 1")
            lowest, highest = got - abs(self.target_slope) / 2, got + abs(self.target_slope) / 2
            require(lowest > 0 and highest < 1, "chi.target_slope", self.target_slope, f"less: with chi.{name}={got} "
                     "every layer's target must stay between 0 and 1")  # fmt: skip
        for name in ("floor_coverage", "floor_rate"):
            require(0 <= getattr(self, name) < 1, f"chi.{name}", getattr(self, name), "a number in [0, 1)")
        positive("chi.eta", self.eta)
        require(self.interval >= 1, "chi.interval", self.interval, "an integer of at least 1")
        positive("chi.width_min", self.width_min)
        require(
            math.isfinite(self.width_max) and self.width_max > self.width_min,
            "chi.width_max",
            self.width_max,
            f"a number above chi.width_min={self.width_min}, and finite",
        )
        positive("chi.width_end", self.width_end)
        holds_coverage = self.policy == "chi" and self.indicator == "coverage"
        require(not self.calibrate or holds_coverage, "chi.calibrate", True, "it with policy chi, indicator coverage")
