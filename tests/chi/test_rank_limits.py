"""Counts of any number of ranks are summed exactly (pipeline/chi/comm_hook.py, `Limbs`): by the fp32 operations of an
all-reduce, in the orders in which rings and trees add, and by DeepSpeed's own averaging."""

from types import SimpleNamespace

import deepspeed.runtime.engine
import numpy as np
import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from pipeline.chi.attach import ranks as attach_ranks
from pipeline.chi.comm_hook import COUNT_BITS, MAX_RANKS, MAX_RANKS_FP64, Limbs
from pipeline.chi.tap import _refuse_unsupported
from pipeline.errors import ConfigError

LARGEST = 2**COUNT_BITS - 1
RANKS = [
    1,
    2,
    3,
    7,
    12,
    1000,
    1023,
    1024,
    1025,
    3000,
    4095,
    4096,
    4097,
    5001,
    8191,
    16384,
    30001,
    MAX_RANKS - 1,
    MAX_RANKS,
]


def counts_of(ranks: int) -> np.ndarray:
    """`(ranks, n)` counts: the largest, the smallest, every bit pattern of the top limb's edge, and random ones."""
    generator = np.random.default_rng(ranks)
    same = np.array([LARGEST, LARGEST - 1, 0, 1, 1 << 35, (1 << 35) - 1, (1 << 24) - 1, 0xAAAAAAAAA, 0x555555555])
    uneven = generator.integers(0, LARGEST, (ranks, 24), endpoint=True)
    near = LARGEST - generator.integers(0, 3, (ranks, 24))
    one = np.zeros((ranks, 1), dtype=np.int64)
    one[ranks // 2] = LARGEST
    return np.concatenate([np.broadcast_to(same, (ranks, len(same))), uneven, near, one], 1)


def orders(limbs: np.ndarray):
    """Sums over ranks in fp32 as all-reduces make them: rings that begin at different ranks, a tree, and at random."""
    assert limbs.dtype == np.float32
    for first in {0, 1, len(limbs) // 2, len(limbs) - 1}:
        yield np.add.accumulate(np.roll(limbs, -first, 0), 0)[-1]
    tree = limbs
    while len(tree) > 1:
        half = len(tree) // 2
        tree = np.concatenate([tree[:half] + tree[half : 2 * half], tree[2 * half :]])
    yield tree[0]
    yield np.add.accumulate(np.random.default_rng(0).permutation(limbs), 0)[-1]


@pytest.mark.parametrize("ranks", RANKS)
def test_counts_survive_a_sum_and_an_average_over_ranks(ranks):
    limbs, counts = Limbs(ranks), counts_of(ranks)
    packed = limbs.pack(torch.from_numpy(counts).flatten()).view(limbs.per_count, ranks, -1)
    rows = packed.transpose(0, 1).reshape(ranks, -1).numpy()
    expected = counts.sum(0).tolist()
    for total in orders(rows):
        summed = torch.from_numpy(total)
        assert limbs.unpack(summed).tolist() == expected
        assert limbs.unpack(limbs.summed(summed.clone().mul_(1.0 / ranks))).tolist() == expected  # as in ZeRO-0
        in_doubles = summed.double().mul_(1.0 / ranks)  # train.precision=fp64
        assert limbs.unpack(limbs.summed(in_doubles)).tolist() == expected


def test_every_number_of_ranks_fits_into_24_bits():
    for ranks in range(1, MAX_RANKS + 1):
        limbs = Limbs(ranks)
        assert ranks * (2**limbs.bits - 1) < 2**24
        assert limbs.bits * limbs.per_count >= COUNT_BITS
        assert limbs.per_count == (3 if ranks <= 4096 else 4)
    assert MAX_RANKS_FP64 * LARGEST < 2**53


@pytest.mark.parametrize("ranks", [1, 3, 64, 3000])
def test_a_rank_may_count_more_than_36_bits_while_the_sum_stays_below_47(ranks):
    limbs, count = Limbs(ranks), (2**47 - 1) // ranks
    summed = limbs.pack(torch.tensor([count, count - 1])) * ranks
    assert summed.max() < 2**24
    averaged = limbs.summed(summed.clone().mul_(1.0 / ranks))
    assert limbs.unpack(summed).tolist() == limbs.unpack(averaged).tolist() == [count * ranks, (count - 1) * ranks]


@pytest.mark.parametrize("ranks", [3, 1023, 3000, 4095, 4096, 30001])
def test_deepspeeds_own_averaging_gives_the_counts_back(ranks, monkeypatch):
    """The reduction of ZeRO-0 in the installed DeepSpeed; every rank sends the same, and only the sum is ours."""
    limbs, counts = Limbs(ranks), torch.tensor([LARGEST, LARGEST - 7, 12345, 0, 2**24 - 1])
    reduced = SimpleNamespace(all_reduce=lambda tensor, group: tensor.mul_(ranks))
    monkeypatch.setattr(deepspeed.runtime.engine, "dist", reduced)
    engine = SimpleNamespace(
        flatten=torch.cat,
        communication_data_type=torch.float32,
        gradient_average=True,
        postscale_gradients=lambda: True,
        gradient_predivide_factor=lambda: 1.0,
    )
    tail = DeepSpeedEngine.allreduce_bucket(engine, [limbs.pack(counts)], None, ranks)  # pyright: ignore
    assert limbs.unpack(limbs.summed(tail)).tolist() == (counts * ranks).tolist()


def world_of(ranks: int) -> SimpleNamespace:
    return SimpleNamespace(dp_world_size=ranks, torch_autocast_enabled=lambda: False)


def test_more_ranks_than_counts_are_exact_for_are_refused():
    for ranks in (1, 1024, 1025, 4096, MAX_RANKS):
        _refuse_unsupported(world_of(ranks))
    _refuse_unsupported(world_of(MAX_RANKS_FP64), MAX_RANKS_FP64)
    for ranks, limit, told in (
        (
            MAX_RANKS + 1,
            MAX_RANKS,
            "32,768 ranks at this ZeRO stage; use fewer, or train.zero_stage=2, which allows 131,072",
        ),
        (MAX_RANKS_FP64 + 1, MAX_RANKS, "32,768 ranks at this ZeRO stage; use fewer"),
        (MAX_RANKS_FP64 + 1, MAX_RANKS_FP64, "131,072 ranks at this ZeRO stage; use fewer"),
    ):
        with pytest.raises(ConfigError) as refused:
            _refuse_unsupported(world_of(ranks), limit)
        assert str(refused.value) == f"world_size={ranks}: χ's counts are exact up to {told}"


def test_chi_attach_refuses_more_ranks_than_its_all_reduce_is_exact_for(monkeypatch):
    for ranks in (4096, MAX_RANKS_FP64):
        monkeypatch.setattr(attach_ranks.dist, "get_world_size", lambda _, ranks=ranks: ranks)
        assert attach_ranks.GroupRanks(None, sharded=False).count == ranks
    monkeypatch.setattr(attach_ranks.dist, "get_world_size", lambda _: MAX_RANKS_FP64 + 1)
    with pytest.raises(ConfigError, match=r"chi.attach: 131073 ranks; counts are exact up to 131,072, use fewer"):
        attach_ranks.GroupRanks(None, sharded=True)
