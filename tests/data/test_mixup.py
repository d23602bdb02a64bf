"""Mixup and cutmix: pixels and targets by their definitions, from draws that depend on the micro-batch alone."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.config import DataConfig
from pipeline.data.decode.mixup import Mixing, draw, symmetric_beta
from pipeline.data.loader import Batch, Loader, evaluation_batches
from pipeline.errors import ConfigError
from tests.data.test_loader import CPU, change, collect
from tests.support.data_sets import drawn_jpeg, write_set

SEED, CLASSES, SIDE, M = 5, 4, 24, 4
BOTH = {"mixup": 0.8, "cutmix": 1.0, "mixup_prob": 0.8}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("mixed")
    images = [drawn_jpeg(n, 32 + n, 80 - n) for n in range(30)]
    write_set(folder / "train", images, per_shard=7, classes=CLASSES)
    write_set(folder / "val", images[:13], per_shard=5, classes=CLASSES)
    return DataConfig(path=str(folder), image_size=SIDE, global_batch=12, micro_batch=M, window_shards=2, threads=1)


def drawn(data: DataConfig, position: int) -> Mixing:
    mixing = draw(data, SEED, position, SIDE, SIDE)
    assert mixing is not None
    return mixing


@pytest.mark.parametrize(("fields", "tolerance"), [({"mixup": 0.8}, 1e-6), ({"cutmix": 1.0}, 0)])
def test_images_and_targets_are_those_of_the_definition(data, fields, tolerance):
    """In fp32; the interpolation rounds three times, of values below 3."""
    plain, shares = collect(data, 0, 8), []
    for position, batch in collect(change(data, **fields), 0, 8).items():
        mixing, labels = drawn(change(data, **fields), position), plain[position].labels.numpy()
        own = plain[position].images.numpy().astype(np.float64)
        shares.append(mixing.share)
        if "mixup" in fields:
            wanted = mixing.share * own + (1 - mixing.share) * own[mixing.partners]
        else:
            assert mixing.box is not None
            top, bottom, left, right = mixing.box
            wanted = own.copy()
            wanted[:, :, top:bottom, left:right] = own[mixing.partners][:, :, top:bottom, left:right]
            assert mixing.share == 1 - (bottom - top) * (right - left) / SIDE**2
        np.testing.assert_allclose(batch.images.numpy(), wanted, rtol=0, atol=tolerance)
        targets = np.zeros((M, CLASSES))
        for sample in range(M):
            targets[sample, labels[sample]] += mixing.share
            targets[sample, labels[mixing.partners[sample]]] += 1 - mixing.share
        np.testing.assert_allclose(batch.targets.numpy(), targets, rtol=0, atol=1e-7)
        assert batch.targets.dtype == torch.float32
        assert batch.labels.tolist() == (labels if mixing.share >= 0.5 else labels[mixing.partners]).tolist()
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert min(shares) < 0.5 < max(shares)


def test_a_micro_batch_is_mixed_alike_on_any_number_of_ranks_and_after_any_resume(data):
    data = change(data, **BOTH)
    whole = collect(data, 0, 6)
    kinds = {drawing and drawing.box is None for at in whole for drawing in [draw(data, SEED, at, SIDE, SIDE)]}
    assert kinds == {None, True, False}, "unmixed, mixup and cutmix"
    for start, ranks in ((0, 3), (2, 1), (4, 3)):
        part = collect(data, start, 6, ranks=ranks)
        assert part.keys() == {at for at in whole if at >= start * 12}
        for at, batch in part.items():
            assert torch.equal(batch.images, whole[at].images)
            assert torch.equal(batch.targets, whole[at].targets)
            assert torch.equal(batch.labels, whole[at].labels)
    another = collect(data, 0, 6, seed=SEED + 1)
    assert all(not torch.equal(batch.images, whole[at].images) for at, batch in another.items())


def test_without_mixing_a_batch_is_handed_out_as_it_is(data):
    one = Loader(data, seed=SEED, rank=0, world_size=1, device=CPU)
    batch = Batch(torch.zeros(M, 3, 8, 8), torch.arange(M), torch.ones(M, dtype=torch.bool), 0)
    assert one._mixed(batch) is batch
    assert batch.targets is batch.labels
    one.close()


def test_an_evaluation_is_not_mixed(data):
    mixed = evaluation_batches(change(data, **BOTH), rank=0, world_size=1, device=CPU)
    for ours, theirs in zip(mixed, evaluation_batches(data, rank=0, world_size=1, device=CPU), strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert ours.targets is ours.labels


def test_images_keep_the_dtype_that_was_asked_for(data):
    data = change(data, mixup=0.8)
    halved = Loader(data, seed=SEED, rank=0, world_size=1, device=CPU, dtype=torch.bfloat16)
    batch = next(next(halved.steps(0, 1)))
    halved.close()
    assert batch.images.dtype == torch.bfloat16
    # Pixels below 3 are rounded by 2^-8 each before and once after they are mixed.
    torch.testing.assert_close(batch.images.float(), collect(data, 0, 1)[0].images, rtol=0, atol=3 * 2**-7)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_shares_follow_the_beta_distribution(alpha):
    """On a fixed even grid of the two uniforms, so nothing is left to chance: the largest gap of 250,000 points."""
    grid = (np.arange(500) + 0.5) / 500
    shares = [symmetric_beta(alpha, first, second) for first in grid for second in grid]
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).statistic < 0.005


@pytest.mark.parametrize("alpha", [1e-18, 1e-3, 1000.0])
@pytest.mark.parametrize("first", [0.0, 1e-300, 1 - 2**-53])
def test_a_share_is_a_share_at_the_ends_of_every_range(alpha, first):
    for second in (0.0, 0.25, 0.5, 0.75, 1 - 2**-53):
        assert 0 <= symmetric_beta(alpha, first, second) <= 1


def test_micro_batches_are_mixed_as_often_as_the_options_say(data):
    data = change(data, mixup=0.8, cutmix=1.0, mixup_prob=0.6, mixup_switch_prob=0.25)
    draws = [draw(data, SEED, position, SIDE, SIDE) for position in range(0, 4 * 4000, 4)]
    mixed = [drawing for drawing in draws if drawing is not None]
    four_sigma = 4 * math.sqrt(0.25 / 2400)
    assert len(mixed) / 4000 == pytest.approx(0.6, abs=four_sigma)
    assert np.mean([drawing.box is not None for drawing in mixed]) == pytest.approx(0.25, abs=four_sigma)
    assert {tuple(sorted(drawing.partners)) for drawing in mixed} == {tuple(range(M))}
    assert len({tuple(drawing.partners) for drawing in mixed}) == math.factorial(M)
    boxes = [drawing.box for drawing in mixed if drawing.box is not None]
    for low, high in ((0, 1), (2, 3)):  # rows, then columns: both borders are reached, and cut
        assert min(box[low] for box in boxes) == 0
        assert max(box[high] for box in boxes) == SIDE
        middle = np.mean([(box[low] + box[high]) / 2 for box in boxes if box[low] < box[high]])
        assert middle == pytest.approx(SIDE / 2, abs=1)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mixup": -0.1}, r"data.mixup=-0.1 is not allowed; use a number from 0 \(off\) to 1000"),
        ({"cutmix": 1e4}, r"data.cutmix=10000.0 is not allowed; use a number from 0 \(off\) to 1000"),
        ({"cutmix": 1.0, "micro_batch": 1}, "data.cutmix=1.0 is not allowed; use 0 with data.micro_batch 1"),
        ({"mixup_prob": 0.0}, r"data.mixup_prob=0.0 is not allowed; use a number in \(0, 1\]"),
        ({"mixup_switch_prob": 1.5}, r"data.mixup_switch_prob=1.5 is not allowed; use a number in \[0, 1\]"),
    ],
)
def test_impossible_mixing_is_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        DataConfig(**fields)
