"""An exponential moving average of the weights, which evaluates better than the last weights while the rate is high.

    average += (1 - d) (weights - average)      after every step, d = min(ema_decay, (1 + step) / (10 + step))

It averages the fp32 weights that the optimizer updates, and BatchNorm's running statistics. Every rank averages the
elements that it updates itself, so ZeRO's stages 1 to 3 partition the average like the optimizer's state: 4 bytes per
element, and one pass over them per step. d is a function of the step alone, so a resumed run goes on exactly. A step
that fp16 skips counts too: the unchanged weights are averaged in once more.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pipeline.engine import engine_state


class Ema:
    """The average of an engine's weights; with a decay of 0 every call does nothing.

    Args:
        engine: a DeepSpeed engine of any ZeRO stage, with the weights that the average begins at.
        decay: share of the average that is kept in a step, in [0, 1).
        keeps: whether this rank wants the tensors of `state_dict`; the rank that writes a checkpoint needs them alone.
    """

    def __init__(self, engine, decay: float, *, keeps: bool = True) -> None:
        self._engine, self._decay, self._keeps = engine, decay, keeps
        self._weights = _owned(engine) if decay else []
        self._average = [weight.detach().clone() for weight in self._weights]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Takes in the weights after step `step`, counted from 1."""
        if self._average:
            get_ema_multi_avg_fn(decay_at(self._decay, step - 1))(self._average, self._weights, step)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While the context is open, the engine computes with the average. Every rank opens and closes it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict | None:
        """The whole average by name, on the CPU, for a checkpoint; None without one. Every rank calls it."""
        if not self._average:
            return None
        with self.shown():
            return engine_state.gather_weights(self._engine, keeps=self._keeps)

    def load_state_dict(self, saved: dict | None) -> None:
        """Puts `state_dict`'s result back, after the engine's own state."""
        if self._average and saved is not None:
            with self.shown():
                engine_state.EngineState(self._engine).load_state_dict({**saved, "optimizer": {}, "updates": {}})

    @torch.no_grad()
    def _swap(self) -> None:
        if not self._average:
            return
        with engine_state.replacing(self._engine):
            for weight, average in zip(self._weights, self._average, strict=True):
                kept = weight.clone()
                weight.copy_(average)
                average.copy_(kept)


def decay_at(decay: float, step: int) -> float:
    """d of step `step`, counted from 0. It rises to `decay`, so that a short run's average forgets its start."""
    return min(decay, (1 + step) / (10 + step))


def _owned(engine) -> list[Tensor]:
    """The fp32 weights that this rank updates, and its running statistics."""
    buffers = [buffer for buffer in engine.module.buffers() if buffer.is_floating_point()]
    return [weight.detach() for weight in engine_state.owned_weights(engine)] + buffers
