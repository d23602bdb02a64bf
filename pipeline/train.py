"""The training run: build every part, then the loop. Read the loop first; each name in it leads to one file.

shards → Loader → Batch → network → loss → backward → all-reduce (+χ) → controller → widths → optimizer → metrics
"""

import time
from pathlib import Path

import torch

from pipeline import checkpoint, report, run_folder
from pipeline.assemble import Run, prepare
from pipeline.chi.allreduce import SIGNALS
from pipeline.chi.controller import steer
from pipeline.config import Config
from pipeline.data.evaluation import evaluation_batches
from pipeline.engine import answered, learning_rate, leave, loss_scale, of_rank_0, set_learning_rate
from pipeline.errors import EXIT_DONE, EXIT_STOPPED, CheckpointError, NonFiniteError
from pipeline.evaluate import Evaluation, evaluate
from pipeline.progress import Step, summary_table
from pipeline.snn import readout
from pipeline.stops import Watch

BAD = SIGNALS.index("bad_samples")


def train(config: Config, watch: Watch) -> int:
    """Trains `config`'s run to its end, from its newest checkpoint where there is one; returns the exit code."""
    with answered(config):
        run = prepare(config, watch)
        try:
            catch_up(run)
            code = loop(run)
            if code == EXIT_DONE:
                finish(run)
        except (CheckpointError, NonFiniteError) as error:
            run.progress.failed(error)
            raise
        finally:
            run.trace.close()
            run.writer.close()
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
        run.nonfinite.begin()
        for batch in micro_batches:
            logits = engine(batch.images)
            loss = readout.loss(config.train, logits, batch.labels)
            tap.observe(loss, logits, batch.labels)
            run.nonfinite.observe(batch, loss)
            tap.signals[BAD] = run.loader.bad.count
            engine.backward(loss)  # after the last micro-batch it reduces the gradients, and χ rides along
            tap.check()  # no update is made from a gradient that is not finite
            engine.step()
        reading = tap.read()  # the same on every rank
        run.progress.skipped(run.step + 1, run.nonfinite.judge(run.step + 1, reading))
        run.ema.update(run.step)
        progress = (run.step + 1) / run.num_steps
        evidence = None if reading.skipped else run.spread.evidence(reading.indicators)
        run.controller, decision = steer(config.chi, run.controller, evidence, progress)
        run.progress.decided(run.step + 1, decision, run.controller, progress)
        scale, data = loss_scale(engine), run.loader.figures()
        run.progress.step(Step(run.step + 1, reading, run.neurons.widths, rate, scale, data))
        run.neurons.widths.copy_(run.controller.widths)
        run.spread.prepare(run.controller.count)
        run.trace.step()
        run.step += 1
        run.pace.step(run.step, run.loader.wait_s)
        run.replicas.check(run.step)
        saves = run.step % config.train.checkpoint_every == 0 or run.step == run.num_steps
        evaluates = evaluation_due(run)
        told, (stop, bad, unsaved) = run.signals.late(run.step, reading.signals)  # SIGNALS: nothing waits for them
        if saves or stop or evaluates:  # here the host waits anyway
            told, (stop, bad, unsaved) = run.signals.newest()
        run.loader.account(bad, told)
        if run.loader.too_many_bad:  # the same on every rank
            refuse_bad(run)
        if unsaved:
            run.writer.raise_failure()
        if saves or stop:
            save(run)
        if stop and run.step < run.num_steps:
            run.writer.wait()
            run.progress.say(f"stopped on request after step {run.step}, checkpoint saved; run again to continue")
            return EXIT_STOPPED
        if evaluates:
            validate(run)
    return EXIT_DONE


def refuse_bad(run: Run) -> None:
    """Ends every rank with the bad samples of all ranks, by name."""
    reasons: list = [None] * run.place.world_size
    torch.distributed.all_gather_object(reasons, run.loader.bad.reasons)
    run.loader.refuse_bad({name: reason for part in reasons for name, reason in part.items()})


def save(run: Run) -> None:
    """A checkpoint of everything that the rest of the run depends on; on the disk once the writer has waited."""
    began = time.monotonic()
    run.replicas.compare(run.step)
    run.progress.flush()  # what the journal lacks when a run is resumed, it never gets
    state = {
        "step": run.step,
        "model": checkpoint.gather(run.engine),
        "ema": run.ema.gather(),
        "controller": run.controller.to_dict(),
        "neurons": run.neurons.to_dict(),
        "loader": run.loader.state_dict(),
        "nonfinite_in_a_row": run.nonfinite.in_a_row,
        "config": run.config.to_dict(),
    }
    run.writer.begin(run.step, state)
    run.progress.held_up(time.monotonic() - began)


def evaluation_due(run: Run) -> bool:
    """After each `eval_every_epochs`, but not at the end, which `finish` evaluates."""
    return run.step < run.num_steps and run.config.evaluates_after(run.step, run.num_samples)


def catch_up(run: Run) -> None:
    """The evaluation after the step that is resumed from, where a stop or a kill came before it."""
    if run.step > 0 and evaluation_due(run) and of_rank_0(run.progress.evaluated_step) < run.step:
        validate(run)


def validate(run: Run) -> Evaluation:
    """Of the weights that the run evaluates: their moving average, where it keeps one."""
    began = time.monotonic()
    batches = evaluation_batches(
        run.config.data, rank=run.place.rank, world_size=run.place.world_size, device=run.place.device
    )
    checkpoint.average_buffers(run.engine)
    with run.ema.shown():
        checkpoint.average_buffers(run.engine)  # the average's own
        result = evaluate(run.engine, batches, run.place.device)
    took_s = time.monotonic() - began
    if result.accuracy > run.writer.best:
        if run.writer.last_step != run.step:
            save(run)
        run.writer.mark_best(run.step, result.accuracy)
    # Last, for whoever goes on after a kill takes it as a sign that the best was marked too.
    run.progress.evaluated(run.step, result.loss, result.accuracy, result.num_samples, took_s)
    return result


def finish(run: Run) -> None:
    """The exact evaluation, the table by layer, the report, and the marker that the run is done."""
    result = validate(run)
    run.writer.wait()
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
