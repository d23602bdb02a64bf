"""The sections model, chi, optim and train of a `Config`; the others are in __init__.py."""

import math
import re
from dataclasses import dataclass

from pipeline.config.checks import checked, one_of, positive, require

SURROGATES = {"triangle": True, "rectangle": True, "atan": False, "sigmoid": False}
"""Shapes of the surrogate gradient (snn/surrogate.py has the formulas), and whether their support is bounded: only then
coverage is defined.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    arch: str = "sew_tiny"
    """Name of the network: sew_tiny; for small images sew_cifar8, or 14, 20, 26, 32, 56; sew_resnet18, or 34, 50, 101,
    152. With ms in place of sew the shortcuts carry membrane currents: ms_tiny, ms_cifar8 to 56, ms_resnet18, 34.
    Or your own, as package.module:function or .../file.py:function; see docs/own_network.md."""
    T: int = 4
    """Time steps, at least 1."""
    connect: str = "add"
    """How a block of a sew network joins its residual: add, and, iand; none leaves the shortcut out, for a plain
    network. The ms networks add."""
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
    """Start every block as its shortcut alone: the scale of its branch's last batch normalisation starts at 0."""
    surrogate: str = "triangle"
    """Shape of the surrogate gradient: triangle, rectangle, atan, sigmoid."""
    scale: str = "area"
    """Normalisation of the surrogate: area (integral 1), peak (maximum 1), rms (area with a steered amplitude)."""
    width: float = 1.0
    """Half-width of the surrogate at the start, in units of the potential, above 0."""
    checkpoint: bool = False
    """Recompute convolutions in the backward pass instead of keeping their outputs: slower, far less memory."""

    def __post_init__(self) -> None:
        checked("model.", self)

    @property
    def is_own(self) -> bool:
        """Whether the network is a user's own, and not one of this package."""
        return ":" in self.arch

    def check(self) -> None:
        """Checks the section's own rules; raises ConfigError."""
        for name, default in (("connect", "add"), ("zero_init_residual", False), ("checkpoint", False)):
            fits = not self.is_own or getattr(self, name) == default
            shown = str(default).lower()
            require(fits, f"model.{name}", getattr(self, name), f"{shown} with your own model.arch, which does without")
        require(self.T >= 1, "model.T", self.T, "an integer of at least 1")
        one_of("model.connect", self.connect, ("add", "and", "iand", "none"))
        require(
            self.connect != "none" or not self.zero_init_residual,
            "model.zero_init_residual",
            self.zero_init_residual,
            "false with model.connect none: a block without a shortcut would be silent",
        )
        one_of("model.neuron", self.neuron, ("if", "lif", "plif"))
        one_of("model.reset", self.reset, ("hard", "soft"))
        one_of("model.surrogate", self.surrogate, tuple(SURROGATES))
        one_of("model.scale", self.scale, ("area", "peak", "rms"))
        require(math.isfinite(self.tau) and self.tau >= 1, "model.tau", self.tau, "a number of at least 1, and finite")
        require(self.neuron != "plif" or self.tau > 1, "model.tau", self.tau, "a number above 1 with model.neuron plif")
        positive("model.v_th", self.v_th)
        positive("model.width", self.width)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChiConfig:
    policy: str = "chi"
    """What sets the widths: fixed leaves them, schedule goes from model.width to width_end, chi holds every layer's
    indicator at its target; mpd_agl and ds_atgo are published methods to compare with, see chi/policies.py."""
    indicator: str = "coverage"
    """Indicator that policy chi holds at the target: coverage, participation, chi, firing_rate."""
    target: float = 0.5
    """Target at the start of training, in (0, 1)."""
    target_end: float = 0.3
    """Target at the end of training; it moves linearly from the one at the start."""
    target_slope: float = 0.0
    """The last layer's target minus the first's, in (-1, 1); linear in between, with the target as the mean."""
    width_end: float = 0.5
    """Width at the end under policy schedule, in units of the potential; log-linear from model.width."""
    eta: float = 0.5
    """Gain of the controller, above 0. For coverage: the share of the distance to the target, in log w, that a decision
    goes. For other indicators: log w += eta (target - indicator)."""
    interval: int = 10
    """Optimizer steps between two decisions, at least 1."""
    floor_coverage: float = 0.01
    """A layer whose coverage is below this is widened, whatever its indicator says; in [0, 1), 0 is off."""
    floor_rate: float = 0.001
    """A layer whose firing rate is below this is widened in the same way; in [0, 1), 0 is off."""
    width_min: float = 0.05
    """Narrowest width, above 0."""
    width_max: float = 8.0
    """Widest width."""
    calibrate: bool = False
    """Start from widths that put the first images' coverage at the target, instead of from model.width: under policy
    chi with indicator coverage, and where init_from brings no widths."""
    self_check: bool = True
    """Compare the first χ with DeepSpeed's own full gradient and refuse to run where they differ."""

    def __post_init__(self) -> None:
        checked("chi.", self)

    def check(self) -> None:
        """Checks the section's own rules; raises ConfigError."""
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

    @property
    def calibrates(self) -> bool:
        """Whether `calibrate` has a target to start from."""
        return self.calibrate and self.policy == "chi" and self.indicator == "coverage"


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    name: str = "sgd"
    """Optimizer: sgd, whose weight_decay is an L2 penalty; adamw, whose weight_decay is decoupled from the gradient."""
    lr: float = 0.1
    """Peak learning rate, above 0."""
    momentum: float = 0.9
    """Momentum of sgd, in [0, 1)."""
    nesterov: bool = False
    """Nesterov's form of sgd's momentum."""
    beta1: float = 0.9
    """Decay rate of adamw's mean of the gradient, in [0, 1)."""
    beta2: float = 0.999
    """Decay rate of adamw's mean of the squared gradient, in [0, 1)."""
    eps: float = 1e-8
    """Added to the square root of adamw's mean of the squared gradient, above 0."""
    weight_decay: float = 0.0
    """Decay of the weights, at least 0."""
    decay_norm_and_neurons: bool = False
    """Decay batch normalisations, biases and the neurons' own parameters too, not only matrices and filters."""
    schedule: str = "cosine"
    """Learning rate after the warm-up: cosine (to 0 at the end), step (times gamma at each milestone), constant."""
    by_epoch: bool = False
    """Let the schedule change the rate only at the start of each epoch, not at every step; the warm-up is by step."""
    milestones: tuple[float, ...] = ()
    """Epochs, from the start of the run, at which schedule step lowers the rate; increasing, as in 30,60,90."""
    gamma: float = 0.1
    """Factor of schedule step at each milestone, in (0, 1]."""
    warmup_epochs: float = 0.0
    """Linear warm-up before the schedule, in epochs, at least 0."""
    clip: float = 0.0
    """Largest L2 norm of the whole gradient; a larger one is scaled down to it; 0 does not clip. χ, participation and
    the reported norms are of the gradient before it is clipped."""

    def __post_init__(self) -> None:
        checked("optim.", self)

    def check(self) -> None:
        """Checks the section's own rules; raises ConfigError."""
        one_of("optim.name", self.name, ("sgd", "adamw"))
        one_of("optim.schedule", self.schedule, ("cosine", "step", "constant"))
        for name in ("lr", "eps"):
            positive(f"optim.{name}", getattr(self, name))
        for name in ("momentum", "beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "a number in [0, 1)")
        require(
            not self.nesterov or (self.name == "sgd" and self.momentum > 0),
            "optim.nesterov",
            self.nesterov,
            "it with optim.name sgd and an optim.momentum above 0",
        )
        for name in ("weight_decay", "warmup_epochs", "clip"):
            got = getattr(self, name)
            require(math.isfinite(got) and got >= 0, f"optim.{name}", got, "a number of at least 0, and finite")
        require(0 < self.gamma <= 1, "optim.gamma", self.gamma, "a number in (0, 1]")
        rising = all(a < b < math.inf for a, b in zip((0.0, *self.milestones), self.milestones, strict=False))
        require(rising, "optim.milestones", self.milestones, "epochs above 0 that rise, as in 30,60,90")
        require(
            bool(self.milestones) == (self.schedule == "step"),
            "optim.milestones",
            self.milestones,
            "at least one epoch with optim.schedule step, and none with another",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    epochs: float = 20.0
    """Length of the run, in passes over the training split, above 0."""
    loss: str = "ce"
    """Loss: ce, the cross-entropy of the logits' mean over time; tet (temporal efficient
    training), the mean of the cross-entropies of all time steps, with a penalty that pulls all logits towards 1."""
    tet_lambda: float = 0.001
    """Weight of tet's penalty, in [0, 1]; its cross-entropies have the weight 1 - tet_lambda."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes while training, in [0, 1)."""
    seed: int = 0
    """Seed of the initial weights, the order and the augmentation, at least 0."""
    precision: str = "bf16"
    """Arithmetic of the forward and backward pass: fp32; bf16 (autocast; parameters stay fp32); fp16 (with a dynamic
    loss scale and fp32 master weights; membranes and batch normalisation stay fp32); fp64 (everything in doubles, with
    the reference kernels and zero_stage 0: for results that must not depend on the machine)."""
    tf32: bool = False
    """With precision fp32, let a GPU multiply in TF32, which rounds factors to 11 bits, for speed."""
    deterministic: bool = False
    """Use only operations that give the same bits in every run on one kind of GPU, so that a resumed run repeats the
    same losses there; convolutions may be slower. On a CPU they do so without it."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage, what it partitions: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters."""
    sync_bn: bool = False
    """Let batch normalisation take its statistics over the micro-batches of all ranks together: for micro-batches of a
    few samples. Costs two small all-reduces per layer and micro-batch. The run cannot change its number of ranks."""
    ema_decay: float = 0.0
    """Decay of a moving average of the weights, which is then evaluated and exported, in [0, 1); 0 keeps none. It
    averages about 1 / (1 - ema_decay) steps, and fewer at the start: the decay is at most (1 + step) / (10 + step).
    Costs 4 bytes per parameter, partitioned over the ranks from ZeRO-1 on."""
    cuda_graph: bool = False
    """On a GPU, launch a micro-batch's forward and backward pass as one CUDA graph each: less work for the host where
    layers or batches are small. Costs a copy of all gradients, which ranks then exchange after the backward pass, not
    during it. Not with sync_bn or zero_stage 3. Not yet tried on a GPU."""
    profile_steps: int = 0
    """Optimizer steps that rank 0 records with torch's profiler into RUN/profile, after the first five
    of each process. Recorded steps are slower. 0 records none."""
    log_every: int = 10
    """Optimizer steps between two lines of progress, at least 1."""
    checkpoint_every: int = 100
    """Optimizer steps between two checkpoints, at least 1."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept, at least 1; with 1 there is no other if it is damaged. The one with the best
    validation accuracy is kept too."""
    eval_every_epochs: float = 0.0
    """Epochs between two evaluations of the validation split, each after the step that uses their last sample;
    0 evaluates only at the end."""
    verify_every: int = 100
    """Optimizer steps between two checks that all ranks hold the same parameters; every save checks too. 0 never
    checks. With ZeRO-3, each rank has its own part, so nothing is compared."""
    on_nonfinite: str = "stop"
    """What a loss or gradient that is not finite does, on all ranks alike: stop ends the run before the update;
    skip(k) makes no update, names the step and its samples, and stops if more than k such steps come in a row."""
    timeout_s: float = 600.0
    """Seconds that a rank waits for the others in a collective before it fails, at least 1. Work that one rank does
    alone must take less: a compilation at the first step, the decoding of a slow file."""

    def __post_init__(self) -> None:
        checked("train.", self)

    def check(self) -> None:
        """Checks the section's own rules; raises ConfigError."""
        positive("train.epochs", self.epochs)
        one_of("train.loss", self.loss, ("ce", "tet"))
        require(0 <= self.tet_lambda <= 1, "train.tet_lambda", self.tet_lambda, "a number in [0, 1]")
        got = self.label_smoothing
        require(0 <= got < 1, "train.label_smoothing", got, "a number in [0, 1)")
        require(0 <= self.seed < 2**63, "train.seed", self.seed, "an integer from 0 to 2**63 - 1")
        one_of("train.precision", self.precision, ("fp32", "bf16", "fp16", "fp64"))
        fits = self.precision == "fp32" or not self.tf32
        require(fits, "train.tf32", self.tf32, "it with train.precision fp32, the only one that TF32 changes")
        require(self.zero_stage in (0, 1, 2, 3), "train.zero_stage", self.zero_stage, "0, 1, 2 or 3")
        fits = self.precision != "fp64" or self.zero_stage == 0
        require(fits, "train.zero_stage", self.zero_stage, "0 with train.precision fp64: DeepSpeed shards fp32 weights")
        inside = "sync_bn true" if self.sync_bn else "zero_stage 3" if self.zero_stage == 3 else ""
        fits = not self.cuda_graph or not inside
        require(fits, "train.cuda_graph", True, f"false with train.{inside}, which exchanges data within a pass")
        for name in ("profile_steps", "verify_every"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "an integer of at least 0")
        require(0 <= self.ema_decay < 1, "train.ema_decay", self.ema_decay, "a number in [0, 1)")
        for name in ("log_every", "checkpoint_every", "keep_checkpoints"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "an integer of at least 1")
        got = self.eval_every_epochs
        require(math.isfinite(got) and got >= 0, "train.eval_every_epochs", got, "a number of at least 0, and finite")
        fits = self.on_nonfinite == "stop" or self.nonfinite_skips > 0
        require(fits, "train.on_nonfinite", self.on_nonfinite, "stop, or skip(k) with k of at least 1, as 'skip(3)'")
        got = self.timeout_s
        require(1 <= got <= 10**6, "train.timeout_s", got, "a number from 1 to 1000000")

    @property
    def nonfinite_skips(self) -> int:
        """Steps in a row that may be skipped; 0 stops at the first."""
        match = re.fullmatch(r"skip\((\d{1,9})\)", self.on_nonfinite)
        return int(match[1]) if match else 0
