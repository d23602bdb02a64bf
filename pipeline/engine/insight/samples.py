"""Which validation samples the network answers right and which wrong, with their pictures."""

import base64
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from pipeline.data.decode.dali_pipeline import MEAN, STD
from pipeline.data.loader import Batch

FIRST = 16
"""Images of the first batch that are kept for a pass of their own."""
KEPT = 6
"""Most samples that are kept as right, and as wrong."""
BATCHES = 64
"""Batches of a rank in which these are looked for; each is read by the host once."""
SIDE, EXACT = 96, 32
"""Pixels: the longest side of a picture, and the longest that is stored without loss."""


class Sample(NamedTuple):
    """A sample and what the network says of it."""

    number: int
    """Its place in the split."""
    label: int
    answer: int
    confidence: float
    """Softmax of the logits, which are averaged over time, at the answer."""
    of_label: float
    """The same at the label."""
    picture: str = ""
    """A data: URL, see `picture`."""

    @property
    def right(self) -> bool:
        return self.label == self.answer

    def document(self, classes: Sequence[str]) -> dict:
        """For JSON, with these names of the classes; a confidence that is not finite is null."""
        sure, of_label = (p if math.isfinite(p) else None for p in (self.confidence, self.of_label))
        return {
            "number": self.number,
            "class": classes[self.label],
            "answer": classes[self.answer],
            "confidence_ratio": sure,
            "confidence_of_class_ratio": of_label,
            "picture": self.picture,
        }


class Samples:
    """Collects samples during one evaluation, in the order of the split. Every rank has one and calls it alike."""

    def __init__(self) -> None:
        self.right: list[Sample] = []
        self.wrong: list[Sample] = []
        self.images: Tensor | None = None
        """The first `FIRST` images of this rank's first batch, `(n, C, H, W)` or `(T, n, C, H, W)`."""
        self.chosen: tuple[int, Sample] | None = None
        """One of these images by its place, and its sample: the first that was answered right, else the first."""
        self._batches = 0

    def see(self, batch: Batch, logits_NK: Tensor) -> None:
        """Call it with every batch and the answers to it."""
        first = self.images is None
        if first:
            self.images = batch.images[..., :FIRST, :, :, :].clone()
        if self._batches == BATCHES:
            return
        self._batches += 1
        found = _found(batch, logits_NK)
        for slot, sample in found.items():
            if self._place(sample) is not None:
                self._keep(_pictured(sample, batch, slot))
        among = {slot: sample for slot, sample in found.items() if first and slot < FIRST}
        if among:
            slot = next((slot for slot, sample in among.items() if sample.right), min(among))
            self.chosen = slot, _pictured(among[slot], batch, slot)

    def gather(self) -> None:
        """After the evaluation: all ranks get the samples of all. A collective, where there are ranks."""
        if not dist.is_initialized():
            return
        of_ranks: list = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, [*self.right, *self.wrong])
        self.right, self.wrong = [], []
        for sample in (sample for samples in of_ranks for sample in samples):
            self._keep(sample)

    def _place(self, sample: Sample) -> int | None:
        return place_for(sample.label, [kept.label for kept in self._alike(sample)])

    def _keep(self, sample: Sample) -> None:
        place = self._place(sample)
        if place is not None:
            self._alike(sample)[place : place + 1] = [sample]

    def _alike(self, sample: Sample) -> list[Sample]:
        return self.right if sample.right else self.wrong


def place_for(label: int, kept: Sequence[int]) -> int | None:
    """Where a sample of this label goes among the `kept` ones, None if nowhere.

    While there is room it is appended. Then a sample of a class that is not there takes the place of the last one whose
    class is there twice: so as many classes are shown as there are.
    """
    if len(kept) < KEPT:
        return len(kept)
    if label in kept:
        return None
    return next((place for place in reversed(range(len(kept))) if kept.count(kept[place]) > 1), None)


def _found(batch: Batch, logits_NK: Tensor) -> dict[int, Sample]:
    """The batch's samples by their place in it, without pictures; those that do not count are left out."""
    shares_NK = logits_NK.double().softmax(1)
    answers = logits_NK.argmax(1)
    columns = [batch.labels.double(), answers.double()]
    columns += [shares_NK.gather(1, chosen[:, None])[:, 0] for chosen in (answers, batch.labels)]
    rows = torch.stack([batch.valid.double(), *columns], 1).tolist()
    return {
        slot: Sample(batch.position + slot, int(label), int(answer), sure, of_label)
        for slot, (valid, label, answer, sure, of_label) in enumerate(rows)
        if valid
    }


def _pictured(sample: Sample, batch: Batch, slot: int) -> Sample:
    return sample._replace(picture=picture(batch.images[..., slot, :, :, :]))


def picture(image: Tensor) -> str:
    """An image as the network gets it, as a small PNG or JPEG in a data: URL.

    Args:
        image: `(C, H, W)` normalised by DALI if C is 3; or event frames `(T, C, H, W)`, which are summed over time:
            with C = 2 the off events are blue and the on events orange. Any other C is averaged to grey.
    """
    pixels = image.detach().float().cpu().nan_to_num()
    channels = pixels.shape[-3]
    if channels == 3:
        frame = pixels if pixels.dim() == 3 else pixels.mean(0)
        levels = frame * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    else:
        frame = pixels if pixels.dim() == 3 else pixels.sum(0)
        frame = frame - frame.amin((1, 2), keepdim=True)
        off, on = frame if channels == 2 else frame.mean(0).expand(2, *frame.shape[1:])
        scale = torch.quantile(torch.cat([off.flatten(), on.flatten()]), 0.995).clamp_min(1e-12)
        off, on = (part / scale for part in (off, on))
        levels = 255 * (torch.stack([on, 0.6 * on + 0.45 * off, off]) if channels == 2 else on.expand(3, *on.shape))
    array = levels.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    drawn = Image.fromarray(np.ascontiguousarray(array))
    drawn.thumbnail((SIDE, SIDE))
    exact, buffer = max(drawn.size) <= EXACT, io.BytesIO()
    drawn.save(buffer, "PNG" if exact else "JPEG", optimize=True, **({} if exact else {"quality": 80}))
    return f"data:image/{'png' if exact else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
