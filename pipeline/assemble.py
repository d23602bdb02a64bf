"""Builds every part of a training run and puts the newest checkpoint into it; train.py is what then goes round."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import deepspeed.comm as dist
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from pipeline import checkpoint, checkpoint_files, init_from, run_folder, source
from pipeline.checkpoint_writer import Writer
from pipeline.chi.allreduce import SIGNALS, Tap
from pipeline.chi.calibrate import calibrated_widths
from pipeline.chi.controller import ControllerState, start, targets_at
from pipeline.chi.host import Later
from pipeline.chi.spread import Spread
from pipeline.config import Config
from pipeline.data.evaluation import evaluation_batches
from pipeline.data.loader import Loader
from pipeline.ema import Ema
from pipeline.engine import Place, build, join, normalise_as_one, of_rank_0
from pipeline.errors import ConfigError
from pipeline.nonfinite import NonFinite
from pipeline.pace import Pace
from pipeline.progress import Progress
from pipeline.rank_metrics import RankMetrics
from pipeline.replicas import Replicas
from pipeline.run_folder import flatten
from pipeline.snn import sew_resnet
from pipeline.snn.neurons import NeuronState, bind
from pipeline.step_trace import Trace
from pipeline.stops import Watch

IMAGES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
"""What the images of each precision are stored as."""
STOP, UNSAVED = SIGNALS.index("stop"), SIGNALS.index("unsaved")


@dataclass(kw_only=True, slots=True)
class Run:
    """Every part of a run, built and resumed."""

    config: Config
    place: Place
    loader: Loader
    engine: DeepSpeedEngine
    ema: Ema
    neurons: NeuronState
    tap: Tap
    signals: Later
    nonfinite: NonFinite
    pace: Pace
    replicas: Replicas
    spread: Spread
    controller: ControllerState
    progress: Progress
    trace: Trace
    writer: Writer
    step: int
    num_steps: int
    num_samples: int


def prepare(config: Config, watch: Watch) -> Run:
    """Builds every part and puts the newest checkpoint into it; from then on `watch` stops the run by request."""
    place = join(config)
    loader = Loader(
        config.data,
        seed=config.train.seed,
        rank=place.rank,
        world_size=place.world_size,
        device=place.device,
        dtype=IMAGES[config.train.precision],
    )
    saved = checkpoint_files.load_to_resume(Path(config.run_dir))
    agree(config, saved["step"] if saved else 0, loader.manifest.identity, place.device)
    classes = len(loader.manifest.classes)
    model = sew_resnet.build(config.model, num_classes=classes, image_size=config.data.smallest_image).to(place.device)
    if config.train.precision == "fp64":
        model.double()  # before weights are read into it
    num_parameters = sum(p.numel() for p in model.parameters())  # before ZeRO-3 takes them apart
    if place.rank == 0:
        print(f"{config.recipe}: {place.world_size} ranks on {place.device.type}, starting DeepSpeed", flush=True)
    if config.init_from and saved is None:
        matched = init_from.load(model, config.init_from)
        if place.rank == 0:
            print(matched, flush=True)
    engine = build(config, model, place.world_size)
    ema = Ema(engine, config.train.ema_decay)
    neurons, layers = bind(model), model.spiking_layers()
    spread = Spread(config.chi, layers, neurons)
    if config.train.sync_bn:
        normalise_as_one(neurons, place.world_size)
    tap = Tap(
        engine,
        layers,
        neurons,
        spread=spread,
        has_coverage=config.model.surrogate in ("triangle", "rectangle"),
        self_check=config.chi.self_check,
        skips=True,
    )
    controller, step = start(neurons.widths), 0
    if saved is not None:
        loader.load_state_dict(saved["loader"])
        checkpoint.scatter(engine, saved["model"])
        ema.scatter(saved.get("ema"))
        controller, step = ControllerState.from_dict(saved["controller"], place.device), saved["step"]
        neurons.widths.copy_(controller.widths)
        neurons.load(saved["neurons"])
        spread.prepare(controller.count)
    num_samples = loader.manifest.num_samples
    if place.rank == 0:
        run_folder.describe(
            config,
            data_identity=loader.manifest.identity,
            classes=loader.manifest.classes,
            layers=neurons.names,
            num_parameters=num_parameters,
            world_size=place.world_size,
        )
    exporter = RankMetrics(
        config,
        rank=place.rank,
        local_rank=place.local_rank,
        world_size=place.world_size,
        layers=neurons.names,
        num_steps=config.num_steps(num_samples),
        identity=loader.manifest.identity,
    )
    progress = Progress(
        config,
        rank=place.rank,
        num_steps=config.num_steps(num_samples),
        step=step,
        layers=neurons.names,
        exporter=exporter,
    )
    if step == 0:
        controller = begin(config, engine, neurons, controller, place)
        progress.began(controller)
    else:
        progress.say(f"resumed from the checkpoint after step {step}")
    writer = Writer(
        Path(config.run_dir),
        active=place.rank == 0,
        keep=config.train.keep_checkpoints,
        step=step,
        best=of_rank_0(checkpoint_files.best(Path(config.run_dir), step)),
        on_failure=lambda: tap.signals.__setitem__(UNSAVED, 1),
        on_saved=progress.saved,
    )
    watch.on_request(lambda: tap.signals.__setitem__(STOP, 1))  # all ranks hear of it with the next all-reduce
    return Run(
        config=config,
        place=place,
        loader=loader,
        engine=engine,
        ema=ema,
        neurons=neurons,
        tap=tap,
        signals=Later(tap.signals),
        nonfinite=NonFinite(
            model,
            loader,
            micro_batch=config.data.micro_batch,
            skips=config.train.nonfinite_skips,
            fp16=config.train.precision == "fp16",
            world_size=place.world_size,
            in_a_row=saved.get("nonfinite_in_a_row", 0) if saved else 0,
        ),
        pace=Pace(model, place.device, every=config.train.log_every, step=step, say=progress.say),
        replicas=Replicas(engine, config.train.verify_every),
        spread=spread,
        controller=controller,
        progress=progress,
        trace=Trace(Path(config.run_dir), config.train.profile_steps if place.rank == 0 else 0, step),
        writer=writer,
        step=step,
        num_steps=config.num_steps(num_samples),
        num_samples=num_samples,
    )


def begin(
    config: Config, engine: DeepSpeedEngine, neurons: NeuronState, controller: ControllerState, place: Place
) -> ControllerState:
    """The controller of a run that is not resumed; where it is calibrated, all ranks look at the same images."""
    if not config.chi.calibrate:
        return controller
    batches = evaluation_batches(config.data, rank=0, world_size=1, device=place.device, split="train")
    images = next(batches).images.to(IMAGES[config.train.precision])
    batches.close()
    widths = calibrated_widths(engine, images, neurons, targets_at(config.chi, 0.0, controller.log_width))
    dist.broadcast(widths, 0)
    controller = start(widths.clamp(config.chi.width_min, config.chi.width_max))
    neurons.widths.copy_(controller.widths)
    return controller


def agree(config: Config, step: int, data_identity: str, device: torch.device) -> None:
    """All ranks run one program with one configuration on the same data from one step, or none does.

    Raises:
        ConfigError: on every rank, naming what differs between them.
    """
    settings = {name: value for name, value in flatten(config.to_dict()).items() if name not in run_folder.OWN}
    shared = "put it on a file system that all nodes share"
    same = {
        "the program is of different versions; install one on all nodes": source.version(),
        "the configurations differ; start every node with the same options": repr(sorted(settings.items())),
        f"data.path={config.data.path!r} holds different data; put the same shards on all nodes": data_identity,
        f"run_dir={config.run_dir!r} holds checkpoints of different steps; {shared}": step,
    }
    digests = [int(hashlib.sha256(str(value).encode()).hexdigest()[:15], 16) for value in same.values()]
    extremes = torch.tensor([digests, [-digest for digest in digests]], device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    for reason, largest, smallest in zip(same, *extremes.tolist(), strict=True):
        if largest != -smallest:
            raise ConfigError(f"the ranks do not agree: {reason}")
