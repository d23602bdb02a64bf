"""What people see while a run goes on: rank 0 makes records of its steps for the console, the journal and trackers."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from pipeline.chi.controller import starved, targets_at
from pipeline.chi.decisions import record_of
from pipeline.chi.tap import Reading
from pipeline.chi.widths import Decision
from pipeline.config import Config
from pipeline.data.loader import Figures
from pipeline.errors import CheckpointError, NonFiniteError
from pipeline.metrics.console import coloured, progress_line
from pipeline.metrics.journal import Journal, layer_labels, read_journal
from pipeline.metrics.rank_metrics import RankMetrics
from pipeline.metrics.trackers import Trackers


class RunLog:
    """Rank 0's console and journal, and every rank's metrics for Prometheus.

    Args:
        config: the run's.
        num_samples: samples of the training split.
        step: step that the run continues after; 0 for a new run.
        layers: names of the spiking layers.
        figures: returns the counts and waits of this rank's data loading.
        loss_scale: returns the scale of the next fp16 loss; None in other precisions.
        exporter: shows this rank to Prometheus.
    """

    def __init__(
        self,
        config: Config,
        *,
        rank: int,
        num_samples: int,
        step: int,
        layers: Sequence[str],
        figures: Callable[[], Figures],
        loss_scale: Callable[[], float | None],
        exporter: RankMetrics,
    ) -> None:
        self._active = rank == 0
        self._config, self._num_steps, self._layers = config, config.num_steps(num_samples), layers
        self._num_samples = num_samples
        self._step = self._logged_step = step
        self._logged_at = time.monotonic()
        self._wait_s = self._aside_s = 0.0
        self._correct: Tensor | None = None
        self._judged = 0
        """Samples since the last logged step; `_correct` of them were classified correctly (it stays on the device)."""
        self._figures, self._loss_scale, self._exporter = figures, loss_scale, exporter
        self._decisions: list[tuple[int, Decision]] = []
        self._below = [False] * len(layers)
        self._saves: list[tuple[float, float]] = []
        self.evaluated_step = -1
        """The last step whose evaluation is in the journal; known on rank 0 only."""
        if self._active:
            run_dir = Path(config.run_dir)
            self._journal = Journal(run_dir / "metrics.jsonl", step)
            earlier = read_journal(run_dir / "metrics.jsonl")
            self._trackers = Trackers(config, layers, earlier)
            self.evaluated_step = max((r["step"] for r in earlier if "eval_loss" in r), default=-1)
            if exporter.said:
                self.say(exporter.said)

    def say(self, line: str) -> None:
        if self._active:
            print(coloured(line, sys.stdout), flush=True)

    def _record(self, record: dict) -> None:
        self._journal.write(record)
        self._trackers.write(record)

    def began(self, log_width: Tensor) -> None:
        """Call it at the start of a run that is not resumed, with ln w `(L,)` that the first decision changes."""
        if self._active:
            self._journal.write({"step": 0, "decision_log_width": log_width.tolist()})

    def flush(self) -> None:
        """Writes the pending decisions, and says which layers fell below a floor or rose above it."""
        for step, decision in self._decisions:
            self._journal.write({"step": step, **record_of(decision)})
            below = starved(self._config.chi, decision.evidence).tolist()
            for label, was, now in zip(layer_labels(self._layers), self._below, below, strict=True):
                if now and not was:
                    self.say(f"step {step}: {label} is below its floor of coverage or firing rate, and is widened")
                elif was and not now:
                    self.say(f"step {step}: {label} is above its floor again")
            self._below = below
        self._decisions.clear()

    def step(self, step: int, reading: Reading, decision: Decision | None, learning_rate: float) -> None:
        """Call it after each step; on every `log_every`-th it reads the step's tensors. Only then does the host wait.

        A decision is written with the next logged step or checkpoint.
        """
        if self._active:
            if decision is not None:
                self._decisions.append((step, decision))
            if reading.skipped:
                self._skipped(step, reading)
        self._show_saves()
        self._step = step
        if self._active and not reading.nonfinite:  # the logits of such a step mean nothing
            self._correct = reading.correct.clone() if self._correct is None else self._correct + reading.correct
            self._judged += self._config.data.global_batch
        if step % self._config.train.log_every and step != self._num_steps:
            return
        now, data = time.monotonic(), self._figures()
        elapsed, steps = now - self._logged_at, step - self._logged_step
        if self._active:
            self._log(step, reading, learning_rate, data, steps, elapsed / steps)
            self._count_steps()
        self._exporter.pace(steps, elapsed, self._aside_s, data)
        self._exporter.publish({"train_last_step_timestamp_seconds": time.time()})
        self._exporter.write()
        self._logged_at, self._logged_step, self._wait_s, self._aside_s = now, step, data.wait_s, 0.0

    def _skipped(self, step: int, reading: Reading) -> None:
        """Rank 0's lines of a step that changed no parameter."""
        if reading.nonfinite:
            self.say(reading.nonfinite)
            samples = list(reading.samples)
            self._journal.write({"step": step, "nonfinite": reading.nonfinite, "nonfinite_samples": samples})
            self._exporter.count(train_nonfinite_steps=1)
        else:
            self.say(f"step {step} skipped: the fp16 gradient overflowed, so the loss scale was lowered")
            self._exporter.count(train_overflow_steps=1)

    def _log(self, step: int, reading: Reading, learning_rate: float, data: Figures, steps: int, step_s: float) -> None:
        """Makes rank 0's record of a step, `steps` after the last logged one, at `step_s` seconds each."""
        chi = self._config.chi
        layers = reading.indicators.to_lists()
        targets = [float("nan")] * len(self._layers)
        if chi.policy == "chi" and chi.indicator == "coverage":
            targets = targets_at(chi, step / self._num_steps, reading.widths).tolist()
        record = {
            "step": step,
            "train_last_step_timestamp_seconds": time.time(),
            "train_loss": reading.loss.item(),
            "train_accuracy_ratio": self._correct.item() / self._judged if self._correct is not None else float("nan"),
            "train_learning_rate": learning_rate,
            "train_grad_norm": reading.indicators.grad_norm.square().nansum().sqrt().item(),
            "train_images_per_second": self._config.data.global_batch / step_s,
            **({"train_image_size_pixels": data.image_size} if self._config.data.image_size_start else {}),
            "data_wait_ratio": (data.wait_s - self._wait_s) / (steps * step_s),
            "network_chi": reading.indicators.network_chi.item(),
            "layer_chi": layers["chi"],
            "layer_participation_ratio": layers["participation"],
            "layer_coverage_ratio": layers["coverage"],
            "layer_coverage_target_ratio": targets,
            "layer_surrogate_width": reading.widths.tolist(),
            "layer_firing_rate_ratio": layers["firing_rate"],
            "layer_gradient_norm": layers["grad_norm"],
        }
        self._correct, self._judged = None, 0
        epoch = step * self._config.data.global_batch / self._num_samples
        self.say(progress_line(record, self._num_steps, epoch, eta_s=step_s * (self._num_steps - step)))
        self._record(record)
        self.flush()
        self._exporter.publish({**record, "train_step": step})
        if (scale := self._loss_scale()) is not None:
            self._exporter.publish({"train_loss_scale": scale})

    def _count_steps(self) -> None:
        """Counts the steps since the last logged one."""
        steps = self._step - self._logged_step
        self._exporter.count(train_steps=steps, train_samples=steps * self._config.data.global_batch)

    def failed(self, error: CheckpointError | NonFiniteError) -> None:
        """Counts the error that ends the run, so that the last scrape shows it."""
        if self._active and isinstance(error, NonFiniteError):
            self._exporter.count(train_nonfinite_steps=1)
        elif self._active:
            self._exporter.count_save("error")
        self._exporter.fail()

    def evaluated(self, step: int, loss: float, accuracy: float, num_samples: int, seconds: float) -> None:
        self._aside("evaluation", seconds)
        self._show_saves()
        if self._active:
            record = {"step": step, "eval_loss": loss, "eval_accuracy_ratio": accuracy}
            if step > self.evaluated_step:  # else it is already there: the run was killed before its summary
                self._record(record)
                self.evaluated_step = step
            self._exporter.publish(record)
            self.say(f"validation after step {step}: {100 * accuracy:.2f} % of {num_samples} samples, loss {loss:.4f}")
        self._exporter.write()

    def held_up(self, seconds: float) -> None:
        """Counts how long the loop waited for a checkpoint to begin; the rest is written during the next steps."""
        self._aside("checkpoint", seconds)
        self._exporter.write()

    def saved(self, _step: int, seconds: float) -> None:
        """Called by the thread that wrote a checkpoint; the main thread shows it with the next step."""
        self._saves.append((seconds, time.time()))

    def _show_saves(self) -> None:
        while self._saves:
            seconds, at = self._saves.pop(0)
            self._exporter.publish(
                {"checkpoint_duration_seconds": seconds, "checkpoint_last_success_timestamp_seconds": at}
            )
            self._exporter.count_save("success")

    def _aside(self, phase: str, seconds: float) -> None:
        """Counts time that is not spent on steps."""
        self._aside_s += seconds
        self._exporter.add_phase(phase, seconds)

    def finish(self) -> None:
        self._show_saves()
        self._exporter.finish()

    def stopped(self) -> None:
        """Call it once the checkpoint of a run that was asked to stop is on the disk."""
        self.say(f"stopped on request after step {self._step}, checkpoint saved; run again to continue")
        if self._active:
            self._show_saves()
            self._exporter.stop()

    def close(self) -> None:
        """Shows what came after the last logged step too, since a stop may come between two."""
        self._show_saves()
        if self._active:
            self._count_steps()
            self._journal.close()
            self._trackers.close()
        self._exporter.write()
        self._exporter.close()


def summary_table(layers: Sequence[str], record: dict) -> str:
    """χ, coverage, width and firing rate of every layer at the last step, for a terminal."""
    labels = layer_labels(layers)
    pad = max(len("layer"), *map(len, labels))
    lines = [f"{'layer':<{pad}}  {'χ':>6}  {'particip.':>9}  {'coverage':>8}  {'width':>6}  {'firing':>6}"]
    names = ("chi", "participation_ratio", "coverage_ratio", "surrogate_width", "firing_rate_ratio")
    columns = [record[f"layer_{name}"] for name in names]
    for label, *values in zip(labels, *columns, strict=True):
        chi, participation, coverage, width, rate = (float("nan") if v is None else v for v in values)
        lines.append(
            f"{label:<{pad}}  {chi:>6.4f}  {participation:>9.4f}  {coverage:>8.4f}  {width:>6.3f}  {rate:>6.4f}"
        )
    return "\n".join(lines)
