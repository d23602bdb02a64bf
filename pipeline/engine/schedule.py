"""What happens at which step, as functions of the step alone: a resumed run goes on exactly where it was.

Steps count from 1; `step` is the one that has just been made, or is about to be.
"""

import math
from fractions import Fraction

from pipeline.config import Config


class Schedule:
    """The plan of one run.

    Args:
        config: the run's.
        num_samples: samples of the training split.
    """

    def __init__(self, config: Config, num_samples: int) -> None:
        self._config, self._num_samples = config, num_samples
        self.num_steps = config.num_steps(num_samples)
        """Optimizer steps of the whole run."""

    def learning_rate(self, step: int) -> float:
        """The rate of `step`: linear warm-up, then `optim.schedule`; cosine falls to 0 over the rest of the run."""
        optim, global_batch = self._config.optim, self._config.data.global_batch
        before = step - 1
        warmup = optim.warmup_epochs * self._num_samples / global_batch
        if before < warmup:
            return optim.lr * step / (warmup + 1)
        # In steps from the start. By epoch: where the epoch began, which may lie within a step.
        began = before * global_batch // self._num_samples * self._num_samples
        position = began / global_batch if optim.by_epoch else before
        if optim.schedule == "constant":
            return optim.lr
        if optim.schedule == "step":
            samples = began if optim.by_epoch else before * global_batch  # whole numbers: no quotient is rounded
            passed = sum(samples >= milestone * self._num_samples for milestone in optim.milestones)
            return optim.lr * optim.gamma**passed
        rest = max(1.0, self.num_steps - warmup)
        return 0.5 * optim.lr * (1 + math.cos(math.pi * max(0.0, position - warmup) / rest))

    def set_learning_rate(self, engine, step: int) -> float:
        """Sets the rate of `step` in every group of parameters; returns it."""
        rate = self.learning_rate(step)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def progress(self, step: int) -> float:
        """Share of the run that is done after `step`, in [0, 1]."""
        return step / self.num_steps

    def saves(self, step: int) -> bool:
        """Whether to save: after each `checkpoint_every`-th step, and at the end."""
        return step % self._config.train.checkpoint_every == 0 or step == self.num_steps

    def evaluates(self, step: int) -> bool:
        """Whether to evaluate: after the step that uses the last sample of each `eval_every_epochs`; not at the end,
        where every run evaluates.
        """
        used = Fraction(self._config.data.global_batch, self._num_samples)  # epochs per step, exact; floats would round
        every = Fraction(str(self._config.train.eval_every_epochs))
        due = every > 0 and step * used // every > (step - 1) * used // every
        return due and 0 < step < self.num_steps
