"""The training run: build every part, then the loop. Read the loop first; each name in it leads to one file.

shards → Loader → Batch → network → loss → backward → all-reduce (+χ) → controller → widths → optimizer → metrics
"""

import time
from pathlib import Path

from pipeline.config import Config
from pipeline.data.loader import evaluation_batches
from pipeline.data.manifest import EVALUATION
from pipeline.engine import engine_state
from pipeline.engine.evaluate import Evaluation, evaluate
from pipeline.engine.insight.spikes import Spikes
from pipeline.errors import EXIT_DONE, EXIT_STOPPED, CheckpointError, NonFiniteError
from pipeline.metrics.run_log import summary_table
from pipeline.ranks import arithmetic
from pipeline.ranks.group import answered, leave, of_rank_0
from pipeline.ranks.stop_requests import Watch
from pipeline.report import report
from pipeline.run import Run, prepare
from pipeline.run_dir import outages, run_folder
from pipeline.snn import losses


def train(config: Config, watch: Watch) -> int:
    """Trains the run of `config` to its end, from its newest checkpoint if there is one; returns the exit code."""
    with answered(config), arithmetic.explained():
        with prepare(config, watch) as run:
            try:
                catch_up(run)
                code = loop(run)
                if code == EXIT_DONE:
                    finish(run)
            except (CheckpointError, NonFiniteError) as error:
                run.log.failed(error)
                raise
        leave()
    return code


def loop(run: Run) -> int:
    """From the step after `run.step` to the last; one iteration is one optimizer step."""
    engine, stats, schedule = run.engine, run.stats, run.schedule
    batches = run.loader.steps(run.step, schedule.num_steps)
    for step, micro_batches in enumerate(batches, start=run.step + 1):
        rate = schedule.set_learning_rate(engine, step)
        for batch in stats.begin(micro_batches):
            logits = engine(batch.images)
            loss = losses.loss(run.config.train, logits, batch.targets)
            stats.observe(batch, loss, logits)
            engine.backward(loss)  # the last micro-batch of a step also all-reduces the gradients and χ
            stats.check()  # no update is made from a gradient that is not finite
            engine.step()
        run.step = step
        reading = stats.reduce(step)  # the same on every rank
        decision = run.widths.step(reading.measured, schedule.progress(step))
        run.log.step(step, reading, decision, rate)
        for part in run.after_step:  # moving average, profiler, straggler, replica check
            part.after_step(step)
        saves, evaluates = schedule.saves(step), schedule.evaluates(step)
        stop = run.flags.after(step, reading, run.writer, wait=saves or evaluates)
        if saves or stop:
            save(run)
        if stop and step < schedule.num_steps:
            return stopped(run)
        if evaluates:
            validate(run)
    return EXIT_DONE


def save(run: Run) -> None:
    """Starts a checkpoint of all that the run needs to continue; `writer.wait` returns when it is on the disk."""
    began = time.monotonic()
    run.replicas.compare(run.step)
    run.log.flush()  # a run that resumes from here does not repeat earlier decisions
    run.writer.begin(run.step, run.state_dict())
    run.log.held_up(time.monotonic() - began)


def stopped(run: Run) -> int:
    """Ends a run that was asked to stop, once its checkpoint is on the disk."""
    run.writer.wait()
    run.log.stopped()
    return EXIT_STOPPED


def catch_up(run: Run) -> None:
    """Makes the evaluation due after the step resumed from, if a stop or a kill came before it."""
    if run.schedule.evaluates(run.step) and of_rank_0(run.log.evaluated_step) < run.step:
        validate(run)


def validate(run: Run, spikes: Spikes | None = None) -> Evaluation:
    """Evaluates the weights on the validation split: their moving average, if the run keeps one.

    `spikes` looks at samples of it meanwhile, and then into the network.
    """
    began = time.monotonic()
    config, place = run.config, run.place
    batches = evaluation_batches(
        config.data, rank=place.rank, world_size=place.world_size, device=place.device, T=config.model.T
    )
    engine_state.average_buffers(run.engine)
    with run.ema.shown():
        engine_state.average_buffers(run.engine)  # the moving average has its own buffers
        if spikes is None:
            result = evaluate(run.engine, batches, place.device)
        else:
            result = evaluate(run.engine, batches, place.device, see=spikes.samples.see)
            spikes.look(run.engine)
    took_s = time.monotonic() - began
    if result.accuracy > run.writer.best:
        if run.writer.last_step != run.step:
            save(run)
        run.writer.mark_best(run.step, result.accuracy)
    # This must come last: a resumed run that finds this evaluation assumes that the best checkpoint is marked.
    run.log.evaluated(run.step, result.loss, result.accuracy, result.num_samples, took_s)
    return result


def finish(run: Run) -> None:
    """Makes the last evaluation, the table by layer, what the report shows of the spikes, the report, and summary.json,
    which marks the run as finished.
    """
    spikes = Spikes(run.widths.neurons, T=run.config.model.T, keeps=run.place.rank == 0)
    result = validate(run, spikes)
    run.writer.wait()
    if run.place.rank != 0:
        return
    run_dir = Path(run.config.run_dir)
    last = report.last_training_record(run_dir)
    print(summary_table(run.widths.neurons.names, last), flush=True)
    summary = {"step": run.step, "eval_accuracy_ratio": result.accuracy, "eval_loss": result.loss}
    seen = spikes.document(
        step=run.step,
        weights=run.config.evaluated_weights,
        split=EVALUATION,
        classes=run.loader.manifest.shown,
    )
    for write in (
        lambda: run_folder.write_json(run_dir / "spikes.json", seen),
        lambda: report.write(run_dir, summary),
        lambda: run_folder.write_json(run_dir / "summary.json", summary),
    ):
        outages.outlast(write, str(run_dir), was_writable=True)
    run.log.finish()
    print(f"done: {100 * result.accuracy:.2f} % on {result.num_samples} samples; see {run_dir}/report.html", flush=True)
