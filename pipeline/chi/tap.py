"""χ in the gradient all-reduce: the tap between DeepSpeed's reduction and the optimizer.

    backward → check() → engine.step() → read()

A carrier counts the reduced gradient and sums the ranks' counters. Where DeepSpeed reduces all gradients at once, the
counters are a tail of that all-reduce (comm_hook.py); else they take one small all-reduce (small_allreduce.py). The
reading describes the gradient of the update, unscaled, before clipping.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.chi.comm_hook import MAX_RANKS, BucketCarrier, Share, Watched
from pipeline.chi.indicators import Indicators, indicators
from pipeline.chi.potential_stats import PotentialStats
from pipeline.chi.small_allreduce import PartitionCarrier
from pipeline.errors import ConfigError
from pipeline.snn.networks.network import SpikingLayer
from pipeline.snn.neurons import NeuronState


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What one optimizer step measured, the same on every rank; tensors on the training device."""

    indicators: Indicators
    """All are NaN where the step was skipped."""
    loss: Tensor
    """Mean over the global batch."""
    correct: Tensor
    """Samples of the global batch that were classified correctly."""
    flags: Tensor
    """`(len(FLAGS),)` int64, summed over ranks."""
    widths: Tensor
    """`(L,)` fp32, the widths w of this step."""
    skipped: bool
    """No parameter changed: the fp16 gradient overflowed and the loss scale was lowered; or see `nonfinite`."""
    nonfinite: str = ""
    """What was not finite, for a message; empty for an fp16 overflow. Only a tap with `skips` sets it."""
    samples: tuple[str, ...] = ()
    """Names of the layers in which something was not finite, as far as known."""

    @property
    def measured(self) -> Indicators | None:
        """The indicators of a step that made an update, else None."""
        return None if self.skipped else self.indicators


FLAGS = ("stop", "bad_samples", "unsaved")
"""What ranks tell each other in every step: a stop was requested, samples were bad, a checkpoint was not saved."""


class Tap:
    """Measures every optimizer step of a DeepSpeed engine; `read()` after `engine.step()`.

    Args:
        engine: an initialised engine of any ZeRO stage; fp32, bf16 by torch_autocast, or the fp16 block.
        layers: the network's spiking layers, in forward order.
        neurons: the counters of these layers (`snn.neurons.bind`).
        spread: what the policy and the scale of the surrogate need beside the indicators; it is sent with the counts.
        has_coverage: whether the surrogate has bounded support.
        self_check: compare the first gradient with `safe_get_full_grad` (one all-reduce of every parameter, once).
        skips: for a gradient that is not finite, make no update and say so in the reading, instead of an error.

    Raises:
        ConfigError: more ranks than counts are exact for; fp16 by torch_autocast.
    """

    def __init__(
        self,
        engine,
        layers: Sequence[SpikingLayer],
        neurons: NeuronState,
        *,
        spread: PotentialStats | None = None,
        has_coverage: bool = True,
        self_check: bool = True,
        skips: bool = False,
    ) -> None:
        self._engine, self._layers, self._neurons = engine, list(layers), neurons
        self._spread = spread
        self._has_coverage = has_coverage
        self._world_size = engine.dp_world_size
        in_bucket = engine.zero_optimization_stage() in (0, 1) and not engine.fp16_enabled()
        carrier = BucketCarrier if in_bucket else PartitionCarrier
        _refuse_unsupported(engine, carrier.max_ranks)
        watched = Watched(engine.module, [layer.weight for layer in self._layers])
        self._num_parameters = int(watched.numel.sum())
        self._weights = watched.numel[watched.layers]
        self.flags = torch.zeros(len(FLAGS), dtype=torch.int64, device=watched.device)
        """This rank's values of `FLAGS`, sent with every step."""
        self._loss = torch.zeros((), device=watched.device)
        self._correct = torch.zeros(1, dtype=torch.int64, device=watched.device)
        self._micro_batches = 0
        self._carrier = carrier(engine, watched, self._share, self_check=self_check, skips=skips)

    # Each micro-batch: what this rank saw.

    def observe(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds a micro-batch's loss and hits to this rank's share; `logits` `(T, N, K)`, `labels` `(N,)`."""
        self._loss += loss.detach().float()
        self._correct += (logits.detach().float().mean(0).argmax(1) == labels).sum()
        self._micro_batches += 1

    def check(self) -> None:
        """Between backward and step: refuses a gradient that is not finite, or that the tap did not see.

        In ZeRO-2 and 3 `engine.step()` and `read()` raise the same errors, also before any update.

        Raises:
            NonFiniteError: the same on every rank, before any parameter changed.
            TapError: the first reduced gradient differs from DeepSpeed's public full gradient.
        """
        if self._engine.is_gradient_accumulation_boundary():
            self._carrier.before_step()

    # After the step: what all ranks saw.

    def read(self) -> Reading:
        """The step's reading; sets the counters to zero for the next step."""
        total = self._carrier.after_step()
        num_layers = len(self._layers)
        neuron_steps, spikes, covered = total.counts[: 3 * num_layers].view(3, -1).double()
        reading = Reading(
            indicators=indicators(
                total.sums,
                total.nnz,
                weights=self._weights,
                parameters=self._num_parameters,
                spikes=spikes,
                covered=covered if self._has_coverage else None,
                neuron_steps=torch.full_like(neuron_steps, float("nan")) if total.skipped else neuron_steps,
            ),
            loss=total.floats[0] / (self._micro_batches * self._world_size),
            correct=total.counts[3 * num_layers],
            flags=total.counts[-len(FLAGS) :],
            widths=self._neurons.widths.clone(),
            skipped=total.skipped,
            nonfinite=total.nonfinite,
        )
        if self._spread is not None and not total.nonfinite:
            self._spread.take(total.floats[1:], num_ranks=self._world_size, neuron_steps=neuron_steps)
        self._neurons.zero_counts()
        self._loss.zero_()
        self._correct.zero_()
        self._micro_batches = 0
        return reading

    def _share(self) -> Share:
        counts = self._neurons.counts()
        integers = (counts[:3].flatten().long(), self._correct, self.flags)
        floats = self._loss.view(1)
        floats = floats if self._spread is None else torch.cat((floats, self._spread.share(counts)))
        return Share(counts=torch.cat(integers), floats=floats)


def _refuse_unsupported(engine, max_ranks: int = MAX_RANKS) -> None:
    if engine.dp_world_size > max_ranks:
        more = PartitionCarrier.max_ranks
        other = f", or train.zero_stage=2, which allows {more:,}" if max_ranks < engine.dp_world_size <= more else ""
        raise ConfigError(
            f"world_size={engine.dp_world_size}: χ's counts are exact up to {max_ranks:,} ranks at this ZeRO stage; "
            f"use fewer{other}"
        )
    if engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16:
        raise ConfigError(
            f"torch_autocast with dtype=float16 in ZeRO-{engine.zero_optimization_stage()} is not allowed: its loss "
            "scale does not recover from an overflow, so every step is skipped; use the fp16 block "
            "(train.precision=fp16), or bf16"
        )
