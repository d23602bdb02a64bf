"""Everything that can be set, with its unit and range. Nothing but the standard library.

A `Config` is built once, in the entry point, from a recipe and its overrides, and then only read. The string under
each field is its documentation; `launch/options.py` prints it for `--help`. The sections for the network and χ are in
config_network.py.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field

from pipeline.config_checks import one_of, positive, require
from pipeline.config_network import ChiConfig, ModelConfig
from pipeline.errors import ConfigError

__all__ = ["ChiConfig", "Config", "DataConfig", "MetricsConfig", "ModelConfig", "OptimConfig", "TrainConfig"]


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
    """Side of the square that the network sees, in pixels; with image_size_start, what it is at the end."""
    image_size_start: int = 0
    """Side at the start of training, from which it grows to image_size, in pixels; 0 takes image_size throughout.
    Evaluations are at image_size."""
    image_size_ramp: tuple[float, ...] = ()
    """Where it grows, with image_size_start: from the first to the second epoch, as in 30,80; at starts of epochs."""
    image_size_step: int = 32
    """In between, the side is a multiple of this, in pixels, at least 1."""
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
        for name in ("image_size", "image_size_step", "global_batch", "micro_batch", "prefetch"):
            require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "an integer of at least 1")
        for name in ("window_shards", "eval_resize", "threads", "cache_bytes", "retries"):
            require(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "an integer of at least 0")
        size, start, ramp = self.image_size, self.image_size_start, self.image_size_ramp
        require(0 <= start < size, "data.image_size_start", start, f"0, or a size below data.image_size={size}")
        fits = len(ramp) == 2 and 0 <= ramp[0] < ramp[1] < math.inf if start else not ramp
        wanted = "two epochs that rise, as in 30,80, with data.image_size_start, and none without"
        require(fits, "data.image_size_ramp", ramp, wanted)
        positive("data.timeout_s", self.timeout_s)
        for name in ("max_bad_ratio", "hw_decoder_load"):
            require(0 <= getattr(self, name) <= 1, f"data.{name}", getattr(self, name), "a number in [0, 1]")
        require(0 < self.crop_area_min <= 1, "data.crop_area_min", self.crop_area_min, "a number in (0, 1]")
        require(
            math.isfinite(self.crop_aspect) and self.crop_aspect >= 1,
            "data.crop_aspect",
            self.crop_aspect,
            "a number of at least 1",
        )
        require(
            self.eval_resize == 0 or self.eval_resize >= self.image_size,
            "data.eval_resize",
            self.eval_resize,
            f"0 or at least data.image_size={self.image_size}",
        )
        require(
            self.global_batch % self.micro_batch == 0,
            "data.global_batch",
            self.global_batch,
            f"a multiple of data.micro_batch={self.micro_batch}",
        )

    @property
    def smallest_image(self) -> int:
        """Side of the smallest images that the network sees, in pixels."""
        return self.image_size_start or self.image_size


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
            require(math.isfinite(got) and got >= 0, f"optim.{name}", got, "a number of at least 0")
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
    sync_bn: bool = False
    """Let batch normalisation take its statistics over the micro-batches of all ranks, which are then its group: for
    micro-batches of a few samples. Two small all-reduces a layer and micro-batch; the run keeps its number of ranks."""
    ema_decay: float = 0.0
    """Share that stays, each step, of a moving average of the weights, which is then what is evaluated and exported, in
    [0, 1); 0 keeps none. It averages about 1 / (1 - ema_decay) steps, and fewer in the first ones: at most (1 + step) /
    (10 + step) stays. Costs 4 bytes a parameter, shared by the ranks from ZeRO-1 on."""
    profile_steps: int = 0
    """Optimizer steps that rank 0 records with torch's profiler into RUN/profile, after five of each process; these are
    slower. 0 records none."""
    log_every: int = 10
    """Optimizer steps between two lines of progress, at least 1."""
    checkpoint_every: int = 100
    """Optimizer steps between two checkpoints, at least 1."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay, at least 1; with 1 there is none to fall back to should it be damaged. The one with
    the best validation accuracy stays in addition."""
    eval_every_epochs: float = 0.0
    """Epochs between two evaluations of the validation split; 0 evaluates at the end only."""
    verify_every: int = 100
    """Optimizer steps between two checks that all ranks hold the same parameters, which every save makes too; 0 makes
    none. ZeRO-3, where each rank has its own part, has nothing to compare."""
    on_nonfinite: str = "stop"
    """What a loss or gradient that is not finite does, on all ranks alike: stop ends the run before the update;
    skip(k) leaves the update out, names the step and its samples, and stops after k such steps in a row."""
    timeout_s: float = 600.0
    """Seconds that a rank waits for the others in a collective before it gives them up, at least 1. What one rank does
    alone must end within it: a compilation at the first step, the decoding of a slow file."""

    def __post_init__(self) -> None:
        positive("train.epochs", self.epochs)
        one_of("train.loss", self.loss, ("ce", "tet"))
        require(0 <= self.tet_lambda <= 1, "train.tet_lambda", self.tet_lambda, "a number in [0, 1]")
        got = self.label_smoothing
        require(0 <= got < 1, "train.label_smoothing", got, "a number in [0, 1)")
        require(0 <= self.seed < 2**63, "train.seed", self.seed, "an integer from 0 to 2**63 - 1")
        one_of("train.precision", self.precision, ("fp32", "bf16", "fp16"))
        require(self.zero_stage in (0, 1, 2, 3), "train.zero_stage", self.zero_stage, "0, 1, 2 or 3")
        for name in ("profile_steps", "verify_every"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "an integer of at least 0")
        require(0 <= self.ema_decay < 1, "train.ema_decay", self.ema_decay, "a number in [0, 1)")
        for name in ("log_every", "checkpoint_every", "keep_checkpoints"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "an integer of at least 1")
        got = self.eval_every_epochs
        require(math.isfinite(got) and got >= 0, "train.eval_every_epochs", got, "a number of at least 0")
        fits = self.on_nonfinite == "stop" or self.nonfinite_skips > 0
        require(fits, "train.on_nonfinite", self.on_nonfinite, "stop, or skip(k) with k of at least 1, as 'skip(3)'")
        got = self.timeout_s
        require(1 <= got <= 10**6, "train.timeout_s", got, "a number from 1 to 1000000")

    @property
    def nonfinite_skips(self) -> int:
        """Steps in a row that may be skipped; 0 stops at the first."""
        match = re.fullmatch(r"skip\((\d{1,9})\)", self.on_nonfinite)
        return int(match[1]) if match else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    port: int = 9464
    """TCP port where rank 0 serves metrics for Prometheus while it trains; 0 takes a free one."""
    host: str = "127.0.0.1"
    """Address that the port is opened on; 0.0.0.0 lets other machines read it."""
    tls_cert: str = ""
    """Certificate, a PEM file, to serve https with; empty serves http."""
    tls_key: str = ""
    """Its private key, a PEM file."""
    tls_client_ca: str = ""
    """Certificates, a PEM file, of which one must have signed a client's own; empty serves every client."""
    tensorboard: bool = False
    """Write the curves for TensorBoard too, into RUN/tensorboard; needs the extra tensorboard."""
    wandb: bool = False
    """Write them for Weights & Biases too, offline, into RUN/wandb; needs the extra wandb."""
    mlflow: bool = False
    """Write them for MLflow too, into RUN/mlflow; needs the extra mlflow."""

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, "metrics.port", self.port, "0 to 65535")
        both = bool(self.tls_cert) == bool(self.tls_key)
        require(both, "metrics.tls_key", self.tls_key, "a file together with metrics.tls_cert, and none without it")
        need = "a file only together with metrics.tls_cert"
        require(bool(self.tls_cert) or not self.tls_client_ca, "metrics.tls_client_ca", self.tls_client_ca, need)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    recipe: str
    """Name of the recipe that this configuration started from."""
    run_dir: str = "runs/digits"
    """Folder of the run: config, metrics, checkpoints, report. A run that stands there is resumed."""
    init_from: str = ""
    """Weights to start from instead of fresh ones: another run's folder or checkpoint, a safetensors file, or a state
    dict in our names, SpikingJelly's or the original SEW-ResNet code's; a run that is resumed does not read it. A run
    with train.ema_decay gives its averaged weights."""
    deepspeed_config: str = ""
    """A JSON file of DeepSpeed settings of your own, merged into the run's: what shows or speeds up a run and changes
    nothing that it computes (comms_logger, flops_profiler, stage3_prefetch_bucket_size and others). All else has an
    option here, and is refused with its name."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    chi: ChiConfig = field(default_factory=ChiConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def __post_init__(self) -> None:
        if self.chi.policy == "mpd_agl" and self.train.zero_stage == 3:
            raise ConfigError(
                "chi.policy='mpd_agl' reads the batch normalisations, which train.zero_stage=3 keeps in pieces; use "
                "train.zero_stage 0, 1 or 2"
            )
        if self.chi.policy == "ds_atgo" and self.train.sync_bn:
            raise ConfigError(
                "chi.policy='ds_atgo' looks at potentials that each rank normalises by itself, which train.sync_bn "
                "changes; use another policy, or train.sync_bn false"
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

    @property
    def evaluated_weights(self) -> str:
        """The weights that the run evaluates: last, or ema where it keeps their moving average."""
        return "ema" if self.train.ema_decay else "last"

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)
