"""engine/insight/samples.py: which samples are kept, with what the network said of them, and their pictures."""

import base64
import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.decode.dali_pipeline import MEAN, STD
from pipeline.data.prefetcher import Batch
from pipeline.engine.insight import samples
from pipeline.engine.insight.samples import KEPT, Samples, picture, place_for

CLASSES = tuple("abcdefghij")


def batch(labels: list[int], answers: list[int], *, position: int = 0, valid: list[bool] | None = None):
    """A batch and logits that answer so, each a little surer than the one before."""
    n = len(labels)
    logits = torch.zeros(n, len(CLASSES))
    logits[torch.arange(n), torch.tensor(answers)] = 1 + torch.arange(n) / 10
    images = torch.full((n, 3, 4, 4), 0.5)
    return Batch(images, torch.tensor(labels), torch.tensor(valid or [True] * n), position), logits


def test_right_and_wrong_samples_are_told_apart_and_have_their_confidence():
    seen = Samples()
    seen.see(*batch([1, 2, 3], [1, 5, 3], position=64, valid=[True, True, False]))
    (right,), (wrong,) = seen.right, seen.wrong
    assert (right.number, right.label, right.answer) == (64, 1, 1)
    document = wrong.document(CLASSES)
    assert document.items() >= {"number": 65, "class": "c", "answer": "f"}.items()
    others = len(CLASSES) - 1
    assert document["confidence_ratio"] == pytest.approx(np.exp(1.1) / (np.exp(1.1) + others))
    assert document["confidence_of_class_ratio"] == pytest.approx(1 / (np.exp(1.1) + others))
    assert right.confidence == right.of_label == pytest.approx(np.e / (np.e + others))
    assert seen.images is not None
    assert len(seen.images) == 3
    assert seen.chosen == (0, right)


def test_the_sample_of_the_raster_is_the_first_right_one_of_the_first_images():
    seen = Samples()
    seen.see(*batch([1, 2, 3], [0, 2, 3]))
    assert seen.chosen is not None
    assert seen.chosen[0] == seen.chosen[1].number == 1
    seen = Samples()
    seen.see(*batch([1, 2, 3], [0, 0, 0], valid=[False, True, True]))
    assert seen.chosen is not None
    assert seen.chosen[0] == 1, "the first, where none is right"
    seen = Samples()
    many = samples.FIRST + 1
    seen.see(*batch([1] * many, [0] * (many - 1) + [1]))
    assert seen.chosen is not None
    assert seen.chosen[0] == 0, "the right one is not in the pass"
    assert seen.images is not None
    assert len(seen.images) == samples.FIRST


def test_a_loss_that_is_not_finite_is_no_number_in_the_document():
    seen = Samples()
    of, logits = batch([1], [1])
    seen.see(of, logits * float("nan"))
    (sample,) = [*seen.right, *seen.wrong]
    assert sample.document(CLASSES)["confidence_ratio"] is None


def test_batches_are_read_by_the_host_up_to_a_limit():
    seen = Samples()
    for index in range(samples.BATCHES):
        seen.see(*batch([0], [0], position=index))
    seen.see(*batch([1], [2], position=samples.BATCHES))
    assert len(seen.right) == KEPT
    assert not seen.wrong


@given(st.lists(st.integers(0, 9), max_size=60))
def test_as_many_classes_as_can_be_are_kept_and_the_first_of_each(labels):
    kept: list[tuple[int, int]] = []
    for number, label in enumerate(labels):
        place = place_for(label, [other for other, _ in kept])
        if place is not None:
            kept[place : place + 1] = [(label, number)]
    assert len(kept) == min(KEPT, len(labels))
    assert len({label for label, _ in kept}) == min(KEPT, len(set(labels)))
    for label in {label for label, _ in kept}:
        assert min(number for other, number in kept if other == label) == labels.index(label)


def decoded(url: str) -> tuple[str, np.ndarray]:
    head, _, data = url.partition(",")
    return head, np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)


def test_a_photograph_has_its_own_colours_again():
    levels = torch.tensor([10.0, 120.0, 250.0])[:, None, None].expand(3, 20, 30)
    normalised = (levels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    head, pixels = decoded(picture(normalised))
    assert head == "data:image/png;base64"
    assert pixels.shape == (20, 30, 3)
    assert (pixels == [10, 120, 250]).all()


def test_a_large_picture_is_made_small():
    url = picture(torch.randn(3, 224, 160))  # noise: the worst case of JPEG
    head, pixels = decoded(url)
    assert head == "data:image/jpeg;base64"
    assert pixels.shape[:2] == (96, 69)
    assert len(url) < 12_000


def test_event_frames_are_summed_with_a_colour_for_each_polarity():
    frames = torch.zeros(4, 2, 8, 8)
    frames[:, 0, 1, 1] = 1  # off
    frames[1:3, 1, 6, 6] = 2  # on, as often
    head, pixels = decoded(picture(frames))
    assert head.startswith("data:image/png")
    assert pixels[0, 0].tolist() == [0, 0, 0]
    red, green, blue = pixels[1, 1]
    assert blue > red + 100
    assert blue > green
    red, green, blue = pixels[6, 6]
    assert red > blue + 100
    assert (pixels.sum(2) > 0).sum() == 2


def test_grey_and_other_channels_are_grey():
    image = torch.linspace(-2, 3, 64).view(1, 8, 8)
    for of in (image, image.expand(5, 8, 8), torch.full((1, 8, 8), float("nan"))):
        _, pixels = decoded(picture(of))
        assert (pixels[..., 0] == pixels[..., 1]).all()
        assert (pixels[..., 0] == pixels[..., 2]).all()
    _, pixels = decoded(picture(image))
    assert pixels[0, 0, 0] == 0
    assert pixels[7, 7, 0] == 255
