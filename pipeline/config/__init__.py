"""All options of a run, with their units and ranges. Standard library only.

A `Config` is built once, in the entry point, from a recipe and its overrides, and then only read. The string under
each field is its documentation; `launch/options.py` prints it for `--help`. `Config` and its sections data and metrics
are here; its sections model, chi, optim and train are in sections.py.
"""

import dataclasses
import math
from dataclasses import dataclass, field

from pipeline.config.checks import INTEGER_MAX, checked, one_of, positive, require, without_secrets
from pipeline.config.policy import rand_augment
from pipeline.config.sections import SURROGATES, ChiConfig, ModelConfig, OptimConfig, TrainConfig
from pipeline.errors import ConfigError

__all__ = [
    "OF_EVENTS",
    "OF_IMAGES",
    "ChiConfig",
    "Config",
    "DataConfig",
    "MetricsConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainConfig",
]

POSITIONS_MAX = 2**45
"""Most pixels of a micro-batch over all time steps. With some hundred channels, their bytes still fit in 64 bits."""
OF_IMAGES = (
    "image_size_start",
    "image_size_ramp",
    "image_size_step",
    "crop_area_min",
    "crop_aspect",
    "aa",
    "color_jitter",
    "reprob",
    "eval_resize",
    "hw_decoder_load",
)
OF_EVENTS = ("event_frames", "event_shift", "event_drop")
"""Fields of `DataConfig` that only a set of images uses, and those that only a set of event recordings uses."""
NEAREST = 8
"""Most numbers of ranks that an error message suggests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    path: str = "data/digits"
    """Folder, or URL (http, https, s3 and others), that holds the shard sets `train/` and `val/`."""
    cache_dir: str = ""
    """Local folder for the shards of a URL, shared by the ranks of a node; empty uses ~/.cache/chispike."""
    cache_bytes: int = 200_000_000_000
    """Largest size of cache_dir, in bytes; the shards that a node's ranks need at once must fit, see docs/data.md."""
    retries: int = 5
    """Further attempts at a remote file after the first has failed, with growing pauses; at least 0."""
    timeout_s: float = 30.0
    """Seconds without any data after which an attempt at a remote file fails, above 0."""
    image_size: int = 16
    """Side of the square image that the network gets, in pixels; with image_size_start, its side at the end. Of event
    data, the side of the frames, in cells: events of a larger sensor are summed."""
    image_size_start: int = 0
    """Side of the images at the start of training, in pixels, which grows to image_size; 0 uses image_size throughout.
    Evaluations always use image_size."""
    image_size_ramp: tuple[float, ...] = ()
    """With image_size_start: two epochs between which the side grows, as in 30,80. It changes when an epoch starts."""
    image_size_step: int = 32
    """While it grows, the side is a multiple of this, in pixels, at least 1."""
    global_batch: int = 128
    """Samples per optimizer step, over all ranks and micro-batches."""
    micro_batch: int = 16
    """Samples per forward pass on one rank: BatchNorm normalises over them, so it changes the result."""
    window_shards: int = 16
    """Samples are shuffled within windows of this many shards; 0 shuffles the whole epoch."""
    crop_area_min: float = 0.08
    """Smallest random crop, as a fraction of the image's area, in (0, 1]; 1 with crop_aspect 1 is no crop. Event data
    has no such crop: see event_shift."""
    crop_aspect: float = 4 / 3
    """Widest aspect ratio of a random crop, at least 1."""
    flip: bool = True
    """Mirror each training image or recording, left and right, with probability 1/2."""
    event_frames: str = "time"
    """How an event recording is cut into model.T frames: time gives all the same duration, count the same number of
    events. For event data, as the next two."""
    event_shift: int = 0
    """Farthest that the picture of a training recording is shifted along each axis, in cells of a frame; events that
    leave the frame are lost."""
    event_drop: float = 0.0
    """Largest share of a training recording's events that is dropped at random, in [0, 1); each recording's share is
    uniform in [0, event_drop)."""
    aa: str = ""
    """Policy of operations on each training image: ta_wide (TrivialAugmentWide); RandAugment as timm writes it, such as
    rand-m9-mstd0.5-inc1; empty for none."""
    color_jitter: float = 0.0
    """Change saturation, brightness and contrast of each training image by factors from 1 - this to 1 + this; 0 is
    off. Not with aa."""
    reprob: float = 0.0
    """Probability of random erasing, in [0, 1]: a box of a training image gets the mean colour."""
    mixup: float = 0.0
    """Mix the images of a micro-batch, and their labels, in pairs: alpha of mixup's Beta(alpha, alpha); 0 is off."""
    cutmix: float = 0.0
    """Put a box of another image into each image, and mix the labels: alpha of cutmix's Beta(alpha, alpha); 0 is
    off."""
    mixup_prob: float = 1.0
    """Probability that a micro-batch is mixed, in (0, 1], where mixup or cutmix is above 0."""
    mixup_switch_prob: float = 0.5
    """Probability that it is cutmix, in [0, 1], where both mixup and cutmix are above 0."""
    eval_resize: int = 0
    """Shorter side before the central crop of an evaluation, in pixels; 0 uses image_size."""
    threads: int = 0
    """Decoding threads per rank; 0 uses this rank's share of the cores."""
    hw_decoder_load: float = 0.0
    """Share of the JPEGs for a GPU's hardware decoder, in [0, 1]. Its pixels differ: exact results need 0."""
    prefetch: int = 3
    """Decoded micro-batches that wait for their step, at least 1; up to three more are being decoded."""
    max_bad_ratio: float = 0.001
    """Share of bad samples (unreadable, truncated, undecodable, mislabelled) above which the run ends, in [0, 1]."""

    def __post_init__(self) -> None:
        checked("data.", self)

    def check(self) -> None:
        """Checks the section's own rules; raises ConfigError."""
        without_secrets("data.path", self.path)
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
            "a number of at least 1, and finite",
        )
        one_of("data.event_frames", self.event_frames, ("time", "count"))
        fits = 0 <= self.event_shift < size
        require(fits, "data.event_shift", self.event_shift, f"an integer from 0 to data.image_size - 1 = {size - 1}")
        require(0 <= self.event_drop < 1, "data.event_drop", self.event_drop, "a number in [0, 1)")
        rand_augment(self.aa)
        fits = 0 <= self.color_jitter <= 1 and not (self.color_jitter and self.aa)
        require(fits, "data.color_jitter", self.color_jitter, "a number in [0, 1], and 0 with data.aa")
        require(0 <= self.reprob <= 1, "data.reprob", self.reprob, "a number in [0, 1]")
        for name in ("mixup", "cutmix"):
            alpha = getattr(self, name)
            require(0 <= alpha <= 1000, f"data.{name}", alpha, "a number from 0 (off) to 1000")
            require(alpha == 0 or self.micro_batch > 1, f"data.{name}", alpha, "0 with data.micro_batch 1: partners "
                     "are of the same micro-batch")  # fmt: skip
        require(0 < self.mixup_prob <= 1, "data.mixup_prob", self.mixup_prob, "a number in (0, 1]")
        got = self.mixup_switch_prob
        require(0 <= got <= 1, "data.mixup_switch_prob", got, "a number in [0, 1]")
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
    def plain(self) -> "DataConfig":
        """Without the changes that DALI's graph makes to training images: the graph of an evaluation."""
        return dataclasses.replace(self, aa="", color_jitter=0.0, reprob=0.0)

    @property
    def mixes(self) -> bool:
        """Whether the training images are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def smallest_image(self) -> int:
        """Side of the smallest images that the network sees, in pixels."""
        return self.image_size_start or self.image_size


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    port: int = 9464
    """TCP port where rank 0 serves metrics for Prometheus while it trains; 0 uses a free one."""
    host: str = "127.0.0.1"
    """Address that the port listens on; 0.0.0.0 lets other machines read the metrics."""
    tls_cert: str = ""
    """Certificate, a PEM file, to serve https with; empty serves http."""
    tls_key: str = ""
    """Private key of tls_cert, a PEM file."""
    tls_client_ca: str = ""
    """CA certificates, a PEM file: one of them must have signed a client's certificate; empty serves every client."""
    tensorboard: bool = False
    """Write the curves for TensorBoard too, into RUN/tensorboard; needs the extra tensorboard."""
    wandb: bool = False
    """Write the curves for Weights & Biases too, offline, into RUN/wandb; needs the extra wandb."""
    mlflow: bool = False
    """Write the curves for MLflow too, into RUN/mlflow; needs the extra mlflow."""

    def __post_init__(self) -> None:
        checked("metrics.", self)

    def check(self) -> None:
        """Checks the section's own rules; raises ConfigError."""
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
    """Folder of the run: config, metrics, checkpoints, report. A run that is already there is resumed."""
    init_from: str = ""
    """Weights to start from: another run's folder or checkpoint, a safetensors file, or a state dict with our names of
    tensors, SpikingJelly's or the original SEW-ResNet code's. A resumed run does not read it. Of a run with
    train.ema_decay, the averaged weights are taken. Of a run with the same layers, model.surrogate and model.width, the
    last widths are taken too; chi.calibrate then does not change them."""
    deepspeed_config: str = ""
    """A JSON file with your own DeepSpeed settings, merged into the run's. Allowed are settings that report on a run or
    speed it up, and do not change what it computes (comms_logger, flops_profiler, stage3_prefetch_bucket_size and
    others). Any other is refused; the message names the option to use instead."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    chi: ChiConfig = field(default_factory=ChiConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def __post_init__(self) -> None:
        checked("", self)

    def check(self) -> None:
        """Checks the rules between sections; raises ConfigError."""
        data, T = self.data, self.model.T
        if T * data.micro_batch * data.image_size**2 > POSITIONS_MAX:
            raise ConfigError(
                f"data.image_size={data.image_size} with data.micro_batch={data.micro_batch} and model.T={T} is more "
                f"than any memory holds; use values with T x micro_batch x image_size² of at most {POSITIONS_MAX}"
            )
        if self.model.is_own:
            for name in ("cuda_graph", "sync_bn"):
                allowed = "false with your own model.arch, whose layers it does not know"
                require(not getattr(self.train, name), f"train.{name}", True, allowed)
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
        if steered_by_coverage and not SURROGATES[self.model.surrogate]:
            raise ConfigError(
                f"chi.indicator='coverage' is undefined for model.surrogate={self.model.surrogate!r}, whose support is "
                "unbounded; use model.surrogate triangle or rectangle, or chi.policy fixed"
            )

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per optimizer step on each of `world_size` ranks."""
        require(world_size >= 1, "world_size", world_size, "1 rank or more")
        data, micro_batches = self.data, self.data.global_batch // self.data.micro_batch
        if micro_batches % world_size:
            divisors = [size for size in range(1, math.isqrt(micro_batches) + 1) if micro_batches % size == 0]
            divisors = sorted({*divisors, *(micro_batches // size for size in divisors)})
            nearest = sorted(sorted(divisors, key=lambda size: abs(size - world_size))[:NEAREST])
            batch = data.micro_batch * world_size * max(1, round(micro_batches / world_size))
            ranks = "rank" if nearest == [1] else "ranks"
            larger = f", or a global batch of {batch}" if batch <= INTEGER_MAX else ""
            raise ConfigError(
                f"data.global_batch={data.global_batch} in micro-batches of {data.micro_batch} does not divide over "
                f"world_size={world_size}; use {' or '.join(map(str, nearest))} {ranks}{larger}"
            )
        return micro_batches // world_size

    def num_steps(self, num_samples: int) -> int:
        """Optimizer steps in the run over a split of `num_samples`.

        Raises:
            ConfigError: the split holds no samples, or the run would have more than INTEGER_MAX steps.
        """
        if num_samples < 1:
            raise ConfigError(
                f"data.path={self.data.path!r}: its split train holds no samples; name a set that has some, or make it "
                "again with python -m data_prep"
            )
        steps = math.ceil(self.train.epochs * num_samples / self.data.global_batch)
        if steps > INTEGER_MAX:
            raise ConfigError(
                f"train.epochs={self.train.epochs!r} over {num_samples} samples in batches of {self.data.global_batch} "
                f"makes {steps} optimizer steps; use fewer epochs, for at most {INTEGER_MAX} steps"
            )
        return steps

    @property
    def cut_off(self) -> str:
        """One line where the run ends before its learning rate or image size has reached its last value; else empty."""
        optim, ramp, epochs = self.optim, self.data.image_size_ramp, self.train.epochs
        late = [one for one in optim.milestones if one >= epochs] if optim.schedule == "step" else []
        cut = {
            f"optim.warmup_epochs={optim.warmup_epochs:g}": 0 < epochs <= optim.warmup_epochs,
            f"optim.milestones {', '.join(f'{one:g}' for one in late)}": bool(late),
            f"data.image_size_ramp={','.join(f'{one:g}' for one in ramp)}": bool(ramp) and epochs < ramp[1],
        }
        names = [name for name, is_cut in cut.items() if is_cut]
        if not names:
            return ""
        return f"train.epochs={epochs:g} ends before {' and '.join(names)}: for a whole, shorter run shorten these too"

    @property
    def evaluated_weights(self) -> str:
        """The weights that the run evaluates: last, or ema if it keeps their moving average."""
        return "ema" if self.train.ema_decay else "last"

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)
