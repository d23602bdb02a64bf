"""Exact accuracy and loss over a split: every sample counts once, at any number of ranks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.loader import Batch
from pipeline.errors import DataError
from pipeline.snn import energy
from pipeline.snn.energy import Energy

LOSS_UNIT = 2.0**-28
"""In nats, less than fp32 resolves in a loss above 0.06. Doubles hold sums up to 33 million nats of it exactly."""


class Evaluation(NamedTuple):
    loss: float
    accuracy: float
    """Top-1, in [0, 1]."""
    num_samples: int


@torch.no_grad()
def evaluate(
    engine,
    batches: Iterable[Batch],
    device: torch.device,
    *,
    see: Callable[[Batch, Tensor], None] = lambda _batch, _logits_NK: None,
) -> Evaluation:
    """Runs the engine's module over `batches` (this rank's share) and sums over ranks. Every rank calls it.

    Args:
        see: called with every batch and the answers to it, logits `(N, K)` averaged over time.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, samples
    double = next(engine.module.parameters()).dtype == torch.float64
    engine.eval()
    for batch in batches:
        logits_NK, losses_N = _answers(engine(batch.images.double() if double else batch.images), batch)
        see(batch, logits_NK)
        hits = logits_NK.argmax(1) == batch.labels
        sums += torch.stack([(value.double() * batch.valid).sum() for value in (losses_N, hits, batch.valid)])
    engine.train()
    torch.distributed.all_reduce(sums)
    loss, correct, samples = sums.tolist()
    if samples == 0:  # the same on every rank
        raise DataError("no sample of the validation split can be used: all are bad, and named above; make it again")
    return Evaluation(loss=loss / samples, accuracy=correct / samples, num_samples=round(samples))


def _answers(logits_TNK: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The mean over time, (N, K) fp32, and each sample's cross-entropy, (N,) fp64.

    The latter is rounded to a multiple of `LOSS_UNIT`, so that a sum is exact and does not depend on its order.
    """
    logits_NK = logits_TNK.float().mean(0)
    losses_N = F.cross_entropy(logits_NK, batch.labels, reduction="none").double()
    return logits_NK, (losses_N / LOSS_UNIT).round() * LOSS_UNIT


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """The results of one process for a split."""

    loss: float
    """Mean cross-entropy, in nats."""
    top5: float | None
    """In [0, 1]; None with five classes or fewer."""
    confusion: Tensor
    """(K, K) int64: samples by class (rows) and by the network's answer (columns)."""
    energy: Energy
    """Operations for one sample and firing rates: means over `num_measured` samples."""
    num_measured: int

    @property
    def num_samples(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        return self.confusion.diagonal().sum().item() / self.num_samples


@torch.no_grad()
def evaluate_in_detail(
    network: nn.Module,
    batches: Iterable[Batch],
    *,
    num_classes: int,
    measure_every: int = 1,
    said: Callable[[int], None] = lambda _: None,
    see: Callable[[Batch, Tensor], None] = lambda _batch, _logits_NK: None,
) -> Detail:
    """Runs `network`, in evaluation mode, over every batch of a split.

    Args:
        network: images to logits (T, N, K), on the device of the batches.
        batches: from `evaluation_batches`; samples that are not `valid` do not count.
        num_classes: K.
        measure_every: firing rates and energy are measured, in an extra pass, on one batch out of this many.
        said: called after every batch, with the number of samples so far.
        see: as for `evaluate`.

    Raises:
        ValueError: no sample was valid.
    """
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    dtype = next(network.parameters()).dtype
    loss, top5, due = 0.0, 0, 0
    measured: list[tuple[Energy, int]] = []
    for index, batch in enumerate(batches):
        valid = batch.valid
        if not valid.any():
            continue
        images = batch.images.to(dtype)
        logits_NK, losses_N = _answers(network(images), batch)
        see(batch, logits_NK)
        logits_NK, losses_N = logits_NK[valid], losses_N[valid]
        labels_N = batch.labels[valid]
        loss += losses_N.double().sum().item()
        pairs = labels_N * num_classes + logits_NK.argmax(1)
        confusion += torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes).cpu()
        best = logits_NK.topk(min(5, num_classes), dim=1).indices
        top5 += int((best == labels_N[:, None]).sum())
        if index >= due:
            measured.append((energy.measure(network, images[..., valid, :, :, :]), len(labels_N)))
            due = index + measure_every
        said(int(confusion.sum()))
    num_samples = int(confusion.sum())
    if num_samples == 0:
        raise ValueError("no sample of the split is valid")
    return Detail(
        loss=loss / num_samples,
        top5=top5 / num_samples if num_classes > 5 else None,
        confusion=confusion,
        energy=energy.average(measured),
        num_measured=sum(count for _, count in measured),
    )
