"""Everything that can be set, with its unit and range. Nothing but the standard library.

A `Config` is built once, in the entry point, from a recipe and its overrides, and then only read. The string under
each field is its documentation; `launch/options.py` prints it for `--help`.
"""

import dataclasses
import math
from dataclasses import dataclass, field

from pipeline.errors import ConfigError


def _require(ok: bool, name: str, got: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{name}={got!r} is not allowed; use {allowed}")


def _one_of(name: str, got: str, allowed: tuple[str, ...]) -> None:
    _require(got in allowed, name, got, "one of " + ", ".join(allowed))


def _positive(name: str, got: float) -> None:
    _require(math.isfinite(got) and got > 0, name, got, "a number above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    path: str = "data/digits"
    """Folder, or URL (http, https, s3 and others), that holds the shard sets `train/` and `val/`."""
    cache_dir: str = ""
    """Local folder for the shards of a URL, shared by the ranks of a node; empty takes ~/.cache/chispike."""
    cache_bytes: int = 200_000_000_000
    """The most that cache_dir may hold, in bytes; two windows of shards and two shards more must fit."""
    retries: int = 5
    """Further attempts at a remote file after one that failed, with growing pauses; at least 0."""
    timeout_s: float = 30.0
    """Seconds without a byte after which an attempt at a remote file has failed, above 0."""
    image_size: int = 16
    """Side of the square that the network sees, in pixels."""
    global_batch: int = 128
    """Samples per optimizer step, over all ranks and micro-batches."""
    micro_batch: int = 16
    """Samples per forward pass on one rank: the group that BatchNorm normalises. Part of the recipe."""
    window_shards: int = 16
    """Samples are shuffled within windows of this many shards; 0 shuffles the whole epoch."""
    crop_area_min: float = 0.08
    """Smallest random crop, as a fraction of the image's area, in (0, 1]; 1 with crop_aspect 1 is no crop."""
    crop_aspect: float = 4 / 3
    """Widest aspect ratio of a random crop, at least 1."""
    flip: bool = True
    """Mirror every second image at random while training."""
    eval_resize: int = 0
    """Shorter side before the central crop of an evaluation, in pixels; 0 takes image_size."""
    threads: int = 0
    """Decoding threads per rank; 0 takes this rank's share of the cores."""
    hw_decoder_load: float = 0.0
    """Share of the JPEGs for a GPU's hardware decoder, in [0, 1]; its pixels differ: only 0 promises exactness."""
    prefetch: int = 3
    """Decoded micro-batches that wait for their step, at least 1; up to three more are in work."""
    max_bad_ratio: float = 0.001
    """Share of bad samples (unreadable, truncated, undecodable, wrongly labelled) that ends the run, in [0, 1]."""

    def __post_init__(self) -> None:
        for name in ("image_size", "global_batch", "micro_batch", "prefetch"):
            _require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "an integer of at least 1")
        for name in ("window_shards", "eval_resize", "threads", "cache_bytes", "retries"):
            _require(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "an integer of at least 0")
        _positive("data.timeout_s", self.timeout_s)
        for name in ("max_bad_ratio", "hw_decoder_load"):
            _require(0 <= getattr(self, name) <= 1, f"data.{name}", getattr(self, name), "a number in [0, 1]")
        _require(0 < self.crop_area_min <= 1, "data.crop_area_min", self.crop_area_min, "a number in (0, 1]")
        _require(
            math.isfinite(self.crop_aspect) and self.crop_aspect >= 1,
            "data.crop_aspect",
            self.crop_aspect,
            "a number of at least 1",
        )
        _require(
            self.eval_resize == 0 or self.eval_resize >= self.image_size,
            "data.eval_resize",
            self.eval_resize,
            f"0 or at least data.image_size={self.image_size}",
        )
        _require(
            self.global_batch % self.micro_batch == 0,
            "data.global_batch",
            self.global_batch,
            f"a multiple of data.micro_batch={self.micro_batch}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    arch: str = "sew_tiny"
    """Name of the network: sew_tiny, or sew_resnet with 18, 34, 50, 101 or 152 behind it."""
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
        _require(self.T >= 1, "model.T", self.T, "an integer of at least 1")
        _one_of("model.connect", self.connect, ("add", "and", "iand"))
        _one_of("model.neuron", self.neuron, ("if", "lif", "plif"))
        _one_of("model.reset", self.reset, ("hard", "soft"))
        _one_of("model.surrogate", self.surrogate, ("triangle", "rectangle", "atan", "sigmoid"))
        _one_of("model.scale", self.scale, ("area", "peak", "rms"))
        _require(math.isfinite(self.tau) and self.tau >= 1, "model.tau", self.tau, "a number of at least 1")
        _require(
            self.neuron != "plif" or self.tau > 1, "model.tau", self.tau, "a number above 1 with model.neuron plif"
        )
        _positive("model.v_th", self.v_th)
        _positive("model.width", self.width)


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
    """Gain of the integral controller: log w += eta (target - indicator), above 0."""
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
    """Start chi from widths that put the first batch's coverage at the target, instead of from model.width."""
    self_check: bool = True
    """Compare the first χ with DeepSpeed's own full gradient and refuse to run where they differ."""

    def __post_init__(self) -> None:
        _one_of("chi.policy", self.policy, ("fixed", "schedule", "chi", "mpd_agl", "ds_atgo"))
        _one_of("chi.indicator", self.indicator, ("coverage", "participation", "chi", "firing_rate"))
        for name in ("target", "target_end"):
            got = getattr(self, name)
            _require(0 < got < 1, f"chi.{name}", got, "a number between 0 and 1")
            lowest, highest = got - abs(self.target_slope) / 2, got + abs(self.target_slope) / 2
            _require(lowest > 0 and highest < 1, "chi.target_slope", self.target_slope, f"less: with chi.{name}={got} "
                     "every layer's target must stay between 0 and 1")  # fmt: skip
        for name in ("floor_coverage", "floor_rate"):
            _require(0 <= getattr(self, name) < 1, f"chi.{name}", getattr(self, name), "a number in [0, 1)")
        _positive("chi.eta", self.eta)
        _require(self.interval >= 1, "chi.interval", self.interval, "an integer of at least 1")
        _positive("chi.width_min", self.width_min)
        _require(
            math.isfinite(self.width_max) and self.width_max > self.width_min,
            "chi.width_max",
            self.width_max,
            f"a number above chi.width_min={self.width_min}",
        )
        _positive("chi.width_end", self.width_end)
        holds_coverage = self.policy == "chi" and self.indicator == "coverage"
        _require(not self.calibrate or holds_coverage, "chi.calibrate", True, "it with policy chi, indicator coverage")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    name: str = "sgd"
    """Optimizer: sgd, whose weight_decay is an L2 penalty; adamw, whose weight_decay is apart from the gradient."""
    lr: float = 0.1
    """Peak learning rate, above 0."""
    momentum: float = 0.9
    """Momentum of sgd, in [0, 1)."""
    nesterov: bool = False
    """Nesterov's form of sgd's momentum."""
    beta1: float = 0.9
    """Memory of adamw's mean of the gradient, in [0, 1)."""
    beta2: float = 0.999
    """Memory of adamw's mean of the squared gradient, in [0, 1)."""
    eps: float = 1e-8
    """What adamw adds to the root of that mean, above 0."""
    weight_decay: float = 0.0
    """Decay of the weights, at least 0."""
    decay_norm_and_neurons: bool = False
    """Decay batch normalisations, biases and the neurons' own parameters too, and not only matrices and filters."""
    schedule: str = "cosine"
    """Learning rate after the warm-up: cosine to 0 at the end; step, times gamma at each milestone; constant."""
    by_epoch: bool = False
    """Let the schedule move at the start of each epoch only, and not at every step; the warm-up is by step."""
    milestones: tuple[float, ...] = ()
    """Where schedule step lowers the rate, in epochs from the start of the run, rising, as in 30,60,90."""
    gamma: float = 0.1
    """Factor of schedule step at each milestone, in (0, 1]."""
    warmup_epochs: float = 0.0
    """Linear warm-up before the schedule, in epochs, at least 0."""
    clip: float = 0.0
    """Largest L2 norm of the whole gradient, to which a larger one is scaled down; 0 does not clip. χ, participation
    and the reported norms are of the gradient before it is clipped."""

    def __post_init__(self) -> None:
        _one_of("optim.name", self.name, ("sgd", "adamw"))
        _one_of("optim.schedule", self.schedule, ("cosine", "step", "constant"))
        for name in ("lr", "eps"):
            _positive(f"optim.{name}", getattr(self, name))
        for name in ("momentum", "beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "a number in [0, 1)")
        _require(
            not self.nesterov or (self.name == "sgd" and self.momentum > 0),
            "optim.nesterov",
            self.nesterov,
            "it with optim.name sgd and an optim.momentum above 0",
        )
        for name in ("weight_decay", "warmup_epochs", "clip"):
            got = getattr(self, name)
            _require(math.isfinite(got) and got >= 0, f"optim.{name}", got, "a number of at least 0")
        _require(0 < self.gamma <= 1, "optim.gamma", self.gamma, "a number in (0, 1]")
        rising = all(a < b < math.inf for a, b in zip((0.0, *self.milestones), self.milestones, strict=False))
        _require(rising, "optim.milestones", self.milestones, "epochs above 0 that rise, as in 30,60,90")
        _require(
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
    """Loss: ce, the cross-entropy of the logits' mean over time; tet, the mean of every time step's own, with a pull
    of all logits towards 1 (temporal efficient training)."""
    tet_lambda: float = 0.001
    """Weight of tet's pull, in [0, 1]; its cross-entropies weigh 1 - tet_lambda."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes while training, in [0, 1)."""
    seed: int = 0
    """Seed of the initial weights, the order and the augmentation, at least 0."""
    precision: str = "bf16"
    """Arithmetic of the forward and backward pass: fp32; bf16 (autocast; parameters stay fp32); fp16 (with a dynamic
    loss scale and fp32 master weights; membranes and batch normalisation stay fp32)."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage, what the ranks share: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters."""
    log_every: int = 10
    """Optimizer steps between two lines of progress, at least 1."""
    checkpoint_every: int = 100
    """Optimizer steps between two checkpoints, at least 1."""
    eval_every_epochs: float = 0.0
    """Epochs between two evaluations of the validation split; 0 evaluates at the end only."""

    def __post_init__(self) -> None:
        _positive("train.epochs", self.epochs)
        _one_of("train.loss", self.loss, ("ce", "tet"))
        _require(0 <= self.tet_lambda <= 1, "train.tet_lambda", self.tet_lambda, "a number in [0, 1]")
        got = self.label_smoothing
        _require(0 <= got < 1, "train.label_smoothing", got, "a number in [0, 1)")
        _require(0 <= self.seed < 2**63, "train.seed", self.seed, "an integer from 0 to 2**63 - 1")
        _one_of("train.precision", self.precision, ("fp32", "bf16", "fp16"))
        _require(self.zero_stage in (0, 1, 2, 3), "train.zero_stage", self.zero_stage, "0, 1, 2 or 3")
        for name in ("log_every", "checkpoint_every"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "an integer of at least 1")
        got = self.eval_every_epochs
        _require(math.isfinite(got) and got >= 0, "train.eval_every_epochs", got, "a number of at least 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    port: int = 9464
    """TCP port where rank 0 serves metrics for Prometheus while it trains; 0 takes a free one."""
    host: str = "127.0.0.1"
    """Address that the port is opened on; 0.0.0.0 lets other machines read it."""

    def __post_init__(self) -> None:
        _require(0 <= self.port <= 65535, "metrics.port", self.port, "0 to 65535")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    recipe: str
    """Name of the recipe that this configuration started from."""
    run_dir: str = "runs/digits"
    """Folder of the run: config, metrics, checkpoints, report. A run that stands there is resumed."""
    init_from: str = ""
    """Weights to start from instead of fresh ones: another run's folder or checkpoint, a safetensors file, or a state
    dict in our names, SpikingJelly's or the original SEW-ResNet code's; a run that is resumed does not read it."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    chi: ChiConfig = field(default_factory=ChiConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def __post_init__(self) -> None:
        if self.model.scale == "rms":
            raise ConfigError(
                "model.scale='rms' is for the network alone: the training loop does not hold E[g²] over ranks; "
                "use area or peak"
            )
        if self.chi.policy == "ds_atgo":
            raise ConfigError(
                "chi.policy='ds_atgo' is for chi.attach: the training loop does not carry the potential's spread over "
                "ranks; use fixed, schedule, chi or mpd_agl"
            )
        if self.chi.policy == "mpd_agl" and self.train.zero_stage == 3:
            raise ConfigError(
                "chi.policy='mpd_agl' reads the batch normalisations, which train.zero_stage=3 keeps in pieces; use "
                "train.zero_stage 0, 1 or 2"
            )
        steered_by_coverage = self.chi.policy == "chi" and self.chi.indicator == "coverage"
        if steered_by_coverage and self.model.surrogate in ("atan", "sigmoid"):
            raise ConfigError(
                f"chi.indicator='coverage' is undefined for model.surrogate={self.model.surrogate!r}, whose support is "
                "unbounded; use model.surrogate triangle or rectangle, or chi.policy fixed"
            )

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per optimizer step on each of `world_size` ranks."""
        micro_batches = self.data.global_batch // self.data.micro_batch
        if micro_batches % world_size:
            fitting = [size for size in range(1, micro_batches + 1) if micro_batches % size == 0]
            raise ConfigError(
                f"data.global_batch={self.data.global_batch} in micro-batches of {self.data.micro_batch} does not "
                f"divide over world_size={world_size}; use {' or '.join(map(str, fitting))} ranks, or a global batch "
                f"of {self.data.micro_batch * world_size * max(1, round(micro_batches / world_size))}"
            )
        return micro_batches // world_size

    def num_steps(self, num_samples: int) -> int:
        """Optimizer steps in the run over a split of `num_samples`."""
        return math.ceil(self.train.epochs * num_samples / self.data.global_batch)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)
