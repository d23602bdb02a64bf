"""The training run: build every part, then the loop. Read the loop first; each name in it leads to one file.

shards → Loader → Batch → network → loss → backward → all-reduce (+χ) → controller → widths → optimizer → metrics
"""

import signal
import time
from dataclasses import dataclass
from pathlib import Path

import deepspeed.comm as dist
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from pipeline import checkpoint, checkpoint_files, init_from, report, run_folder
from pipeline.chi.allreduce import SIGNALS, Tap
from pipeline.chi.calibrate import calibrated_widths
from pipeline.chi.controller import ControllerState, start, steer, targets_at
from pipeline.chi.spread import Spread
from pipeline.config import Config
from pipeline.data.loader import Loader, evaluation_batches
from pipeline.engine import Place, build, join, learning_rate, leave, set_learning_rate
from pipeline.errors import EXIT_DONE, EXIT_STOPPED, ConfigError
from pipeline.evaluate import Evaluation, evaluate
from pipeline.progress import Progress, summary_table
from pipeline.snn import readout, sew_resnet
from pipeline.snn.neurons import NeuronState, bind

STOP, BAD = SIGNALS.index("stop"), SIGNALS.index("bad_samples")


@dataclass(kw_only=True, slots=True)
class Run:
    """Every part of a run, built and resumed."""

    config: Config
    place: Place
    loader: Loader
    engine: DeepSpeedEngine
    neurons: NeuronState
    tap: Tap
    spread: Spread
    controller: ControllerState
    progress: Progress
    step: int
    num_steps: int
    num_samples: int


def train(config: Config) -> int:
    """Trains `config`'s run to its end, from its newest checkpoint where there is one; returns the exit code."""
    run = prepare(config)
    try:
        code = loop(run)
        if code == EXIT_DONE:
            finish(run)
    finally:
        run.progress.close()
        run.loader.close()
    leave()
    return code


def loop(run: Run) -> int:
    """From `run.step` to `run.num_steps`; one iteration is one optimizer step."""
    config, engine, tap = run.config, run.engine, run.tap
    for micro_batches in run.loader.steps(run.step, run.num_steps):
        rate = learning_rate(config, run.step, run.num_samples)
        set_learning_rate(engine, rate)
        for batch in micro_batches:
            logits = engine(batch.images)
            loss = readout.loss(config.train, logits, batch.labels)
            tap.observe(loss, logits, batch.labels)
            tap.signals[BAD] = run.loader.bad.count
            engine.backward(loss)  # after the last micro-batch it reduces the gradients, and χ rides along
            tap.check()  # no update is made from a gradient that is not finite
            engine.step()
        reading = tap.read()  # the same on every rank
        progress = (run.step + 1) / run.num_steps
        evidence = None if reading.skipped else run.spread.evidence(reading.indicators)
        run.controller, decision = steer(config.chi, run.controller, evidence, progress)
        run.progress.decided(run.step + 1, decision, run.controller, progress)
        run.progress.step(
            run.step + 1,
            reading,
            widths=run.neurons.widths,
            targets=targets_at(config.chi, progress, len(run.neurons.names)),
            learning_rate=rate,
            wait_s=run.loader.wait_s,
        )
        run.neurons.widths.copy_(run.controller.widths)
        run.step += 1
        stop, bad = reading.signals.tolist()  # in the order of SIGNALS; the one value a step that the host waits for
        if run.loader.too_many_bad(bad, run.step):  # the same on every rank
            refuse_bad(run, bad)
        if stop or run.step % config.train.checkpoint_every == 0 or run.step == run.num_steps:
            save(run)
        if stop and run.step < run.num_steps:
            run.progress.say(f"stopped on request after step {run.step}, checkpoint saved; run again to continue")
            return EXIT_STOPPED
        if evaluation_due(run):
            validate(run)
    return EXIT_DONE


def prepare(config: Config) -> Run:
    """Builds every part and puts the newest checkpoint into it."""
    place = join(config)
    loader = Loader(
        config.data,
        seed=config.train.seed,
        rank=place.rank,
        world_size=place.world_size,
        device=place.device,
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.precision],
    )
    classes = len(loader.manifest.classes)
    model = sew_resnet.build(config.model, num_classes=classes, image_size=config.data.image_size).to(place.device)
    num_parameters = sum(p.numel() for p in model.parameters())  # before ZeRO-3 takes them apart
    if place.rank == 0:
        print(f"{config.recipe}: {place.world_size} ranks on {place.device.type}, starting DeepSpeed", flush=True)
    saved = checkpoint_files.load_newest(Path(config.run_dir))
    if config.init_from and saved is None:
        matched = init_from.load(model, config.init_from)
        if place.rank == 0:
            print(matched, flush=True)
    engine = build(config, model, place.world_size)
    neurons, layers = bind(model), model.spiking_layers()
    tap = Tap(
        engine,
        layers,
        neurons,
        has_coverage=config.model.surrogate in ("triangle", "rectangle"),
        self_check=config.chi.self_check,
    )
    controller, step = start(neurons.widths), 0
    if saved is not None:
        loader.load_state_dict(saved["loader"])
        checkpoint.scatter(engine, saved["model"])
        controller, step = ControllerState.from_dict(saved["controller"], place.device), saved["step"]
        neurons.widths.copy_(controller.widths)
    agree(step, config.run_dir, place.device)
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
    progress = Progress(
        config,
        rank=place.rank,
        num_steps=config.num_steps(num_samples),
        step=step,
        layers=neurons.names,
        identity=loader.manifest.identity,
    )
    if step == 0:
        controller = begin(config, engine, neurons, controller, place)
        progress.began(controller)
    else:
        progress.say(f"resumed from the checkpoint after step {step}")
    stop_on_signal(tap)
    return Run(
        config=config,
        place=place,
        loader=loader,
        engine=engine,
        neurons=neurons,
        tap=tap,
        spread=Spread(config.chi, layers, neurons),
        controller=controller,
        progress=progress,
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
    images = next(batches).images
    batches.close()
    widths = calibrated_widths(engine, images, neurons, targets_at(config.chi, 0.0, len(neurons.names)))
    dist.broadcast(widths, 0)
    controller = start(widths.clamp(config.chi.width_min, config.chi.width_max))
    neurons.widths.copy_(controller.widths)
    return controller


def agree(step: int, run_dir: str, device: torch.device) -> None:
    """All ranks resume from one step, or none does."""
    steps = torch.tensor([step, -step], device=device)
    dist.all_reduce(steps, op=dist.ReduceOp.MAX)
    newest, oldest = steps[0].item(), -steps[1].item()
    if newest != oldest:
        raise ConfigError(
            f"run_dir={run_dir!r} holds step {newest} on one rank and {oldest} on another; put it on a file system "
            "that all nodes share"
        )


def stop_on_signal(tap: Tap) -> None:
    """SIGTERM, SIGINT or SIGUSR1 to any rank stops all after the step; the same signal again leaves at once."""

    def request(number: int, _frame) -> None:
        tap.signals[STOP] = 1
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, request)


def refuse_bad(run: Run, count: int) -> None:
    """Ends every rank with the bad samples of all ranks, by name."""
    reasons: list = [None] * run.place.world_size
    torch.distributed.all_gather_object(reasons, run.loader.bad.reasons)
    run.loader.refuse_bad(count, run.step, {name: reason for part in reasons for name, reason in part.items()})


def save(run: Run) -> None:
    """A checkpoint of everything that the rest of the run depends on."""
    began = time.monotonic()
    run.progress.flush()  # what the journal lacks when a run is resumed, it never gets
    state = {
        "step": run.step,
        "model": checkpoint.gather(run.engine),
        "controller": run.controller.to_dict(),
        "loader": run.loader.state_dict(),
        "config": run.config.to_dict(),
    }
    if run.place.rank == 0:
        checkpoint_files.save(Path(run.config.run_dir), run.step, state)
    run.progress.saved(run.step, time.monotonic() - began)


def evaluation_due(run: Run) -> bool:
    """At the first step of each `eval_every_epochs`, but not at the end, which `finish` evaluates."""
    every = run.config.train.eval_every_epochs * run.num_samples / run.config.data.global_batch
    return every > 0 and run.step < run.num_steps and run.step // every > (run.step - 1) // every


def validate(run: Run) -> Evaluation:
    checkpoint.average_buffers(run.engine)
    batches = evaluation_batches(
        run.config.data, rank=run.place.rank, world_size=run.place.world_size, device=run.place.device
    )
    result = evaluate(run.engine, batches, run.place.device)
    run.progress.evaluated(run.step, result.loss, result.accuracy, result.num_samples)
    return result


def finish(run: Run) -> None:
    """The exact evaluation, the table by layer, the report, and the marker that the run is done."""
    result = validate(run)
    if run.place.rank != 0:
        return
    run_dir = Path(run.config.run_dir)
    last = report.last_training_record(run_dir)
    print(summary_table(run.neurons.names, last), flush=True)
    summary = {"step": run.step, "eval_accuracy_ratio": result.accuracy, "eval_loss": result.loss}
    report.write(run_dir, summary)
    run_folder.write_json(run_dir / "summary.json", summary)
    run.progress.finish()
    print(f"done: {100 * result.accuracy:.2f} % on {result.num_samples} samples; see {run_dir}/report.html", flush=True)
