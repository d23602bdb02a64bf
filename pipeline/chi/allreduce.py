"""χ rides the gradient all-reduce: the tap between DeepSpeed's reduction and the optimizer.

DeepSpeed (ZeRO-0 and 1) flattens all gradients into one fp32 bucket and reduces it once per optimizer step, in
`allreduce_bucket` of the engine (ZeRO-0) or of its optimizer (ZeRO-1). The tap replaces that method on the instance:

    bucket  g_0 | g_1 | … | tail      the tail holds this rank's integers: spikes, covered neuron-steps, signals
       ↓ all-reduce                   the one that DeepSpeed does anyway; the tail adds 24 bytes a layer
    reduced g_0 | g_1 | …  → gradient_sums, the same on every rank
    summed  tail           → counts over all ranks, exact

so χ costs no collective of its own. Integers travel as three 12-bit limbs in fp32: a sum over up to 1,024 ranks stays
below 2²², and is recovered exactly also where the bucket is averaged rather than summed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.chi.indicator import Indicators, gradient_sums, indicators
from pipeline.errors import ConfigError, NonFiniteError
from pipeline.snn.neurons import NeuronState
from pipeline.snn.sew_resnet import SpikingLayer

LIMB_BITS, NUM_LIMBS, MAX_RANKS = 12, 3, 1024
NUM_SCALARS = 1  # floats that ride behind the integers: the sum of the losses


class TapError(RuntimeError):
    """The tap and DeepSpeed disagree about the reduced gradient: χ would be wrong, so nothing is trained."""


def pack(counts: Tensor) -> Tensor:
    """`(n,)` int64, each in [0, 2**36), as `(3n,)` float32 limbs."""
    mask = (1 << LIMB_BITS) - 1
    return torch.cat([(counts >> (LIMB_BITS * limb)) & mask for limb in range(NUM_LIMBS)]).float()


def unpack(limbs: Tensor) -> Tensor:
    """The `(n,)` int64 of which the sums of the ranks' `pack` are given."""
    rows = limbs.double().round().long().view(NUM_LIMBS, -1)
    return sum((rows[limb] << (LIMB_BITS * limb) for limb in range(1, NUM_LIMBS)), start=rows[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What one optimizer step measured, the same on every rank; tensors on the training device."""

    indicators: Indicators
    loss: Tensor
    """Mean over the global batch."""
    correct: Tensor
    """Samples of the global batch that were classified correctly."""
    signals: Tensor
    """`(len(SIGNALS),)` int64, summed over ranks."""


SIGNALS = ("stop", "bad_samples")


class Tap:
    """Measures every optimizer step of a DeepSpeed engine; `read()` after `engine.step()`.

    Args:
        engine: an initialised engine, ZeRO stage 0 or 1, gradients reduced in fp32.
        layers: the network's spiking layers, in forward order.
        neurons: the counters of these layers (`snn.neurons.bind`).
        has_coverage: whether the surrogate's support is bounded.
        self_check: compare the first gradient with `safe_get_full_grad` (one all-reduce of every parameter, once).
    """

    def __init__(
        self,
        engine,
        layers: Sequence[SpikingLayer],
        neurons: NeuronState,
        *,
        has_coverage: bool = True,
        self_check: bool = True,
    ) -> None:
        self._engine, self._layers, self._neurons = engine, list(layers), neurons
        self._has_coverage, self._unchecked = has_coverage, self_check
        self._world_size = engine.dp_world_size
        if self._world_size > MAX_RANKS:
            raise ConfigError(f"world_size={self._world_size}: χ's counts are exact up to {MAX_RANKS} ranks; use fewer")
        parameters = [p for p in engine.module.parameters() if p.requires_grad]
        self._names = {id(p): name for name, p in engine.module.named_parameters()}
        self._rows = {id(layer.weight): row for row, layer in enumerate(self._layers)}
        device = parameters[0].device
        self._num_parameters = sum(p.numel() for p in parameters)
        self._weights = torch.tensor([layer.weight.numel() for layer in self._layers], device=device)
        self.signals = torch.zeros(len(SIGNALS), dtype=torch.int64, device=device)
        """This rank's share of `SIGNALS`, sent with every step."""
        self._loss = torch.zeros((), device=device)
        self._correct = torch.zeros(1, dtype=torch.int64, device=device)
        self._micro_batches = 0
        self._sums: dict[str, Tensor] = {}
        self._tail: Tensor | None = None
        self._install()

    # Each micro-batch: what this rank saw.

    def observe(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds a micro-batch's loss and hits to this rank's share; `logits` `(T, N, K)`, `labels` `(N,)`."""
        self._loss += loss.detach().float()
        self._correct += (logits.detach().float().mean(0).argmax(1) == labels).sum()
        self._micro_batches += 1

    def check(self) -> None:
        """Between backward and step: refuses a gradient that is not finite, or that the tap did not see.

        Raises:
            NonFiniteError: the same on every rank, before any parameter changed.
            TapError: the first reduced gradient differs from DeepSpeed's public full gradient.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            return
        if self._tail is None:
            raise TapError("DeepSpeed reduced no gradient through allreduce_bucket; this version is not supported")
        broken = [name for name, sums in self._sums.items() if not bool(torch.isfinite(sums).all())]
        if broken:
            raise NonFiniteError(f"the gradient of {broken[0]} and of {len(broken) - 1} more parameters is not finite")
        if self._unchecked:
            self._compare_with_deepspeed()
            self._unchecked = False

    # After the step: what all ranks saw.

    def read(self) -> Reading:
        """The step's reading; starts the next step's counters at zero."""
        assert self._tail is not None, "read() comes after the step of the last micro-batch"
        counts = unpack(self._tail[:-NUM_SCALARS])
        num_layers = len(self._layers)
        spikes, covered, (correct, *_) = counts.split([num_layers, num_layers, 1 + len(SIGNALS)])
        neuron_steps = torch.tensor([layer.neuron.neuron_steps for layer in self._layers], device=counts.device)
        zero = torch.zeros(3, dtype=torch.float64, device=counts.device)
        sums = [self._sums.get(self._names[id(layer.weight)], zero) for layer in self._layers]
        reading = Reading(
            indicators=indicators(
                torch.stack(sums),
                torch.stack(list(self._sums.values()))[:, 0].sum(),
                weights=self._weights,
                parameters=self._num_parameters,
                spikes=spikes,
                covered=covered if self._has_coverage else None,
                neuron_steps=neuron_steps * self._micro_batches * self._world_size,
            ),
            loss=self._tail[-1].double() / (self._micro_batches * self._world_size),
            correct=correct,
            signals=counts[-len(SIGNALS) :],
        )
        self._neurons.zero_counts()
        self._loss.zero_()
        self._correct.zero_()
        self._micro_batches, self._sums, self._tail = 0, {}, None
        return reading

    # Inside the reduction.

    def _install(self) -> None:
        stage = self._engine.zero_optimization_stage()
        if stage not in (0, 1):
            raise ConfigError(f"train.zero_stage={stage}: χ is read from the all-reduce of ZeRO 0 and 1; use 0 or 1")
        owner = self._engine.optimizer if stage == 1 else self._engine
        layout = self._zero1_layout if stage == 1 else self._zero0_layout
        owner.allreduce_bucket = self._counted(owner.allreduce_bucket, layout, averages=stage == 0)

    def _counted(self, reduce: Callable[..., Tensor], layout: Callable, averages: bool) -> Callable[..., Tensor]:
        def allreduce_bucket(bucket: list[Tensor], *args, **kwargs) -> Tensor:
            if bucket[0].dtype != torch.float32 or kwargs.get("rank") is not None:
                raise TapError(f"a {bucket[0].dtype} bucket was reduced; χ needs one fp32 all-reduce of all gradients")
            owned = layout(bucket)
            if self._tail is not None:
                reduced = reduce(bucket, *args, **kwargs)
            else:
                tail = self._local_tail()
                flat = reduce([*bucket, tail], *args, **kwargs)
                reduced = flat[: -tail.numel()]
                # A copy: the flat bucket is DeepSpeed's, and is freed or reused after the step.
                self._tail = flat[-tail.numel() :].clone().mul_(self._world_size if averages else 1)
            for parameter, gradient in zip(owned, reduced.split([p.numel() for p in owned]), strict=True):
                self._sums[self._names[id(parameter)]] = gradient_sums(gradient)
            return reduced

        return allreduce_bucket

    def _local_tail(self) -> Tensor:
        counts = (self._neurons.spikes, self._neurons.covered, self._correct, self.signals)
        return torch.cat((pack(torch.cat(counts)), self._loss.view(1)))

    def _zero0_layout(self, bucket: list[Tensor]) -> list[Tensor]:
        by_address = {
            p.grad.data_ptr(): p for p in self._engine.module.parameters() if p.grad is not None and p.numel() > 0
        }
        return [by_address[gradient.data_ptr()] for gradient in bucket]

    def _zero1_layout(self, bucket: list[Tensor]) -> list[Tensor]:
        # The bucket arrives cut by destination rank; its elements lie as the whole parameters did when it was filled.
        optimizer = self._engine.optimizer
        return [optimizer.bit16_groups[g][i] for g, i, _ in optimizer.ipg_buckets[bucket[0].dtype].params]

    def _compare_with_deepspeed(self) -> None:
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in self._engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            full = safe_get_full_grad(parameter)
            expected = gradient_sums(full)[0].item() if full is not None else 0.0
            seen = self._sums[name][0].item() if name in self._sums else 0.0
            if seen != expected:
                raise TapError(
                    f"χ's self-check failed: {name} has {expected:.0f} non-zero gradients by DeepSpeed's full gradient "
                    f"and {seen:.0f} by the all-reduce hook; use the DeepSpeed version of constraints.txt"
                )
