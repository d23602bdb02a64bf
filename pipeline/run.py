"""Builds every part of a training run and loads its newest checkpoint; train.py holds the loop."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import deepspeed.comm as dist
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from pipeline.chi.tap import Tap
from pipeline.chi.widths import Widths
from pipeline.config import Config
from pipeline.config.config_json import flatten
from pipeline.config.sections import SURROGATES
from pipeline.data.loader import Loader, evaluation_batches
from pipeline.data.manifest import TRAIN
from pipeline.engine import init_from
from pipeline.engine.ema import Ema
from pipeline.engine.engine import build, loss_scale, normalise_as_one
from pipeline.engine.engine_state import EngineState
from pipeline.engine.flags import Flags
from pipeline.engine.insight.profiler import Profiler
from pipeline.engine.schedule import Schedule
from pipeline.engine.step_stats import NonFinite, StepStats
from pipeline.errors import ConfigError, StoreError
from pipeline.metrics.rank_metrics import RankMetrics
from pipeline.metrics.run_log import RunLog
from pipeline.ranks import arithmetic
from pipeline.ranks.group import Place, join, of_rank_0
from pipeline.ranks.replica_check import ReplicaCheck
from pipeline.ranks.stop_requests import Watch
from pipeline.ranks.straggler import Straggler
from pipeline.run_dir import checkpoint_files, code_version, locks, run_folder
from pipeline.run_dir.checkpoint_writer import Writer
from pipeline.snn.graphed_pass import record_passes, require_graphs
from pipeline.snn.networks import own_source
from pipeline.snn.networks.build import build as build_network
from pipeline.snn.networks.network import SpikingLayer
from pipeline.snn.neurons import NeuronState, bind

log = logging.getLogger(__name__)

IMAGES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
"""Dtype of the input images for each `train.precision`."""


class Stateful(Protocol):
    """A part of a run that a checkpoint holds."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> None: ...


@dataclass(kw_only=True, slots=True)
class Run:
    """Every part of a run, built and resumed."""

    config: Config
    place: Place
    schedule: Schedule
    loader: Loader
    engine: DeepSpeedEngine
    ema: Ema
    nonfinite: NonFinite
    widths: Widths
    stats: StepStats
    flags: Flags
    log: RunLog
    trace: Profiler
    straggler: Straggler
    replicas: ReplicaCheck
    writer: Writer
    step: int
    """Optimizer steps done."""

    @property
    def parts(self) -> dict[str, Stateful]:
        """Everything that a checkpoint holds, by its key there; saving and resuming iterate over it."""
        return {
            "loader": self.loader,
            "model": EngineState(self.engine, keeps=self.place.rank == 0),
            "ema": self.ema,
            "widths": self.widths,
            "nonfinite": self.nonfinite,
        }

    @property
    def after_step(self) -> tuple:
        """Parts whose `after_step` the loop calls after every step."""
        return self.ema, self.trace, self.straggler, self.replicas

    def state_dict(self) -> dict:
        """The checkpoint after `step`. A collective: every rank calls it."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        return {"step": self.step, "config": self.config.to_dict(), **parts}

    def load_state_dict(self, saved: dict) -> None:
        """Loads a checkpoint, written by any number of ranks. A collective."""
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        self.step = saved["step"]

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: object, error: BaseException | None, _trace: object) -> None:
        """Ends the threads and closes the files of all parts. An error of that is raised where it is the first one."""
        for part in (self.trace, self.writer, self.log, self.loader):
            try:
                part.close()
            except (OSError, StoreError) as another:
                error = error or another
                log.info("%s could not be closed: %s", type(part).__name__, another)
        if kind is None and error is not None:
            raise error


def prepare(config: Config, watch: Watch) -> Run:
    """Builds every part and loads the newest checkpoint; from then on, a request seen by `watch` stops the run."""
    arithmetic.choose(config.train)
    place = join(config)
    require_graphs(config, place.device)
    loader = Loader(
        config.data,
        seed=config.train.seed,
        rank=place.rank,
        world_size=place.world_size,
        device=place.device,
        dtype=IMAGES[config.train.precision],
        T=config.model.T,
    )
    if place.local_rank == 0 and place.rank > 0:
        locks.look_from_another_node(Path(config.run_dir))
    saved = checkpoint_files.load_to_resume(Path(config.run_dir))
    step = saved["step"] if saved else 0
    source = own_source.find(config.model.arch)
    agree(config, step, loader.manifest.identity, "" if source is None else source.digest, place.device)
    model = build_network(
        config.model,
        num_classes=len(loader.manifest.classes),
        in_channels=loader.manifest.channels,
        image_size=config.data.image_size,
        image_size_start=config.data.image_size_start,
        image_size_step=config.data.image_size_step,
        micro_batch=config.data.micro_batch,
    ).to(place.device)
    imports = {} if source is None else own_source.imported(source)
    if source is not None:
        what = f"model.arch={config.model.arch!r} imports different code; put the same files on all nodes"
        require_same({what: imports}, place.device)
    if config.train.precision == "fp64":
        model.double()  # before weights are loaded into it
    num_parameters = sum(p.numel() for p in model.parameters())  # before ZeRO-3 partitions them
    if place.rank == 0:
        print(f"{config.recipe}: {place.world_size} ranks on {place.device.type}, starting DeepSpeed", flush=True)
        if config.cut_off:
            print(config.cut_off, flush=True)
    widths = None
    if config.init_from and saved is None:
        said, widths = init_from.load(model, config)
        if place.rank == 0:
            print(said, flush=True)
    engine = build(config, model, place.world_size)
    neurons, layers = bind(model), model.spiking_layers()
    require_weights(config, layers)
    if config.train.sync_bn:
        normalise_as_one(neurons, place.world_size)
    if config.train.cuda_graph:
        record_passes(model, neurons)
    schedule = Schedule(config, loader.manifest.num_samples)
    if place.rank == 0:
        run_folder.describe(
            config,
            data_identity=loader.manifest.identity,
            classes=loader.manifest.classes,
            layers=neurons.names,
            num_parameters=num_parameters,
            world_size=place.world_size,
            kind=loader.manifest.kind,
            network_code=b"" if source is None else source.code,
            network_imports=imports,
        )
    run = assembled(config, place, loader, engine, neurons, layers, schedule, step)
    if saved is not None:
        run.load_state_dict(saved)
        run.log.say(f"resumed from the checkpoint after step {step}")
    else:
        if widths is not None:
            run.widths.start_from(widths.to(place.device))
        elif config.chi.calibrates:
            calibrate(run)
        elif config.chi.calibrate:
            start = f"model.width={config.model.width:g}"
            run.log.say(f"widths start from {start}: chi.calibrate is for policy chi with indicator coverage")
        run.log.began(run.widths.controller.log_width)
    watch.on_request(run.flags.ask_to_stop)  # the next all-reduce tells all ranks
    return run


def assembled(
    config: Config,
    place: Place,
    loader: Loader,
    engine: DeepSpeedEngine,
    neurons: NeuronState,
    layers: list[SpikingLayer],
    schedule: Schedule,
    step: int,
) -> Run:
    """Builds the parts around an engine, for a run that continues after `step`."""
    network = cast(nn.Module, engine.module)
    widths = Widths(config.chi, layers, neurons)
    tap = Tap(
        engine,
        layers,
        neurons,
        spread=widths.stats,
        has_coverage=SURROGATES[config.model.surrogate],
        self_check=config.chi.self_check,
        skips=True,
    )
    nonfinite = NonFinite(
        network,
        loader,
        micro_batch=config.data.micro_batch,
        skips=config.train.nonfinite_skips,
        fp16=config.train.precision == "fp16",
        world_size=place.world_size,
    )
    flags = Flags(tap.flags, loader, place.world_size)
    exporter = RankMetrics(
        config,
        rank=place.rank,
        local_rank=place.local_rank,
        world_size=place.world_size,
        layers=neurons.names,
        num_steps=schedule.num_steps,
        identity=loader.manifest.identity,
    )
    log = RunLog(
        config,
        rank=place.rank,
        num_samples=loader.manifest.num_samples,
        step=step,
        layers=neurons.names,
        figures=loader.figures,
        loss_scale=lambda: loss_scale(engine),
        exporter=exporter,
    )
    writer = Writer(
        Path(config.run_dir),
        active=place.rank == 0,
        keep=config.train.keep_checkpoints,
        step=step,
        best=of_rank_0(checkpoint_files.best(Path(config.run_dir), step)),
        on_failure=flags.report_unsaved,
        on_saved=log.saved,
    )
    every = config.train.log_every
    return Run(
        config=config,
        place=place,
        schedule=schedule,
        loader=loader,
        engine=engine,
        ema=Ema(engine, config.train.ema_decay, keeps=place.rank == 0),
        nonfinite=nonfinite,
        widths=widths,
        stats=StepStats(tap, nonfinite, flags, config.train.seed),
        flags=flags,
        log=log,
        trace=Profiler(Path(config.run_dir), config.train.profile_steps if place.rank == 0 else 0, step),
        straggler=Straggler(network, place.device, every=every, step=step, waited=lambda: loader.wait_s, say=log.say),
        replicas=ReplicaCheck(engine, config.train.verify_every),
        writer=writer,
        step=step,
    )


def require_weights(config: Config, layers: list[SpikingLayer]) -> None:
    """Raises ConfigError where the widths follow an indicator of weights and a layer of neurons has none."""
    without = [layer.name for layer in layers if layer.weight is None]
    if without and config.chi.policy == "chi" and config.chi.indicator in ("chi", "participation"):
        raise ConfigError(
            f"chi.indicator={config.chi.indicator!r} is undefined for {without[0]}, which no weight feeds; use "
            "chi.indicator coverage or firing_rate"
        )


def calibrate(run: Run) -> None:
    """Sets the first widths of a run that is not resumed, from the same images on every rank."""
    config, device = run.config, run.place.device
    batches = evaluation_batches(config.data, rank=0, world_size=1, device=device, split=TRAIN, T=config.model.T)
    images = next(batches).images.to(IMAGES[config.train.precision])
    batches.close()
    coverage = run.widths.calibrate(run.engine, images, lambda widths: dist.broadcast(widths, 0)).nan_to_num(0.0)
    low, high = run.widths.neurons.widths.aminmax()
    run.log.say(
        f"widths start at {low:.3g} to {high:.3g}, with a coverage of {coverage.min():.2f} to {coverage.max():.2f} on "
        f"{config.data.micro_batch} training samples"
    )


def agree(config: Config, step: int, data_identity: str, network: str, device: torch.device) -> None:
    """Checks that all ranks have the same program, configuration, data, code of the network and first step.

    Raises:
        ConfigError: on every rank, naming what differs between them.
    """
    settings = {name: value for name, value in flatten(config.to_dict()).items() if name not in run_folder.OWN}
    shared = "put it on a file system that all nodes share"
    same = {
        "the program is of different versions; install one on all nodes": code_version.version(),
        "the configurations differ; start every node with the same options": repr(sorted(settings.items())),
        f"data.path={config.data.path!r} holds different data; put the same shards on all nodes": data_identity,
        f"model.arch={config.model.arch!r} is of different code; put the same file on all nodes": network,
        f"run_dir={config.run_dir!r} holds checkpoints of different steps; {shared}": step,
    }
    require_same(same, device)


def require_same(facts: Mapping[str, object], device: torch.device) -> None:
    """Checks that every value is the same on all ranks.

    Raises:
        ConfigError: on every rank, with the name of the first value that differs.
    """
    digests = [int(hashlib.sha256(str(value).encode()).hexdigest()[:15], 16) for value in facts.values()]
    extremes = torch.tensor([digests, [-digest for digest in digests]], device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    for reason, largest, smallest in zip(facts, *extremes.tolist(), strict=True):
        if largest != -smallest:
            raise ConfigError(f"the ranks do not agree: {reason}")
