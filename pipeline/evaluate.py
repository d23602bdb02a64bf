"""Exact accuracy and loss over a split: every sample counts once, at any number of ranks."""

from collections.abc import Iterable
from typing import NamedTuple

import deepspeed.comm as dist
import torch
from torch.nn import functional as F

from pipeline.data.loader import Batch


class Evaluation(NamedTuple):
    loss: float
    accuracy: float
    """Top-1, in [0, 1]."""
    num_samples: int


@torch.no_grad()
def evaluate(engine, batches: Iterable[Batch], device: torch.device) -> Evaluation:
    """Runs the engine's module over `batches` (this rank's share) and sums over ranks. Every rank calls it."""
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, samples
    engine.eval()
    for batch in batches:
        logits = engine(batch.images).float().mean(0)
        losses = F.cross_entropy(logits, batch.labels, reduction="none")
        hits = logits.argmax(1) == batch.labels
        sums += torch.stack([(value.double() * batch.valid).sum() for value in (losses, hits, batch.valid)])
    engine.train()
    dist.all_reduce(sums)
    loss, correct, samples = sums.tolist()
    return Evaluation(loss=loss / samples, accuracy=correct / samples, num_samples=round(samples))
