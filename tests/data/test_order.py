"""The order: every sample once an epoch, the same for any number of ranks; a resume only sets a counter."""

import bisect
import itertools
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.order import Order, mix
from pipeline.errors import DataError

SHAPES = st.lists(st.integers(1, 40), min_size=1, max_size=12)
SEEDS = st.integers(0, 2**40)


def order(sizes: list[int], seed: int, window: int) -> Order:
    return Order(sizes, seed=seed, window_shards=window)


def shares(order: Order, *, batch: int, micro_batch: int, ranks: int, step: int) -> list[list[int]]:
    """The micro-batches of one optimizer step, rank after rank, as the loader asks for them."""
    share = batch // ranks
    starts = [step * batch + rank * share + at for rank in range(ranks) for at in range(0, share, micro_batch)]
    return [order.samples(start, micro_batch)[1].tolist() for start in starts]


@given(SHAPES, SEEDS, st.integers(0, 13), st.integers(1, 17))
def test_every_sample_comes_once_in_each_epoch_and_none_is_lost_between(sizes, seed, window, chunk):
    stream, total = order(sizes, seed, window), sum(sizes)
    got = [stream.samples(start, chunk) for start in range(0, 3 * total + chunk, chunk)]
    epochs = np.concatenate([e for e, _ in got])[: 3 * total]
    numbers = np.concatenate([n for _, n in got])[: 3 * total]
    assert epochs.tolist() == np.repeat([0, 1, 2], total).tolist()
    for epoch in numbers.reshape(3, total):
        assert np.array_equal(np.sort(epoch), np.arange(total))


@given(SHAPES, SEEDS, st.integers(0, 13), st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 40))
def test_global_batches_and_micro_batches_are_the_same_at_every_world_size(sizes, seed, window, ranks, step):
    alone = shares(order(sizes, seed, window), batch=24, micro_batch=2, ranks=1, step=step)
    assert shares(order(sizes, seed, window), batch=24, micro_batch=2, ranks=ranks, step=step) == alone


@given(SHAPES, SEEDS, st.integers(0, 13), st.integers(0, 2000), st.integers(1, 64))
def test_the_stream_resumes_at_any_position(sizes, seed, window, start, count):
    whole = order(sizes, seed, window)
    for position in range(0, start, 50):  # earlier requests must not matter
        whole.samples(position, 50)
    fresh = order(sizes, seed, window)
    for before, after in zip(whole.samples(start, count), fresh.samples(start, count), strict=True):
        assert np.array_equal(before, after)


@given(SHAPES, SEEDS, st.integers(0, 13), st.integers(0, 1000))
def test_shards_at_names_the_shards_of_a_position(sizes, seed, window, position):
    stream = order(sizes, seed, window)
    owners = np.repeat(np.arange(len(sizes)), sizes)
    assert owners[stream.samples(position, 1)[1][0]] in stream.shards_at(position)


@given(SHAPES, SEEDS, st.integers(0, 13), st.integers(0, 20), st.data())
def test_coming_names_the_window_that_the_rank_needs_next_and_no_other(sizes, seed, window, step, data):
    """Expected: from a walk over the rank's positions. Global batches are smaller and larger than windows."""
    stream, share, ranks = order(sizes, seed, window), data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    global_batch, rank = share * ranks, data.draw(st.integers(0, ranks - 1))
    first = step * global_batch + rank * share + data.draw(st.integers(0, share - 1))
    here = {int(shard) for shard in stream.shards_at(first)}
    got = stream.coming(first, first, share=share, global_batch=global_batch)
    assert set(got[: len(here)]) == here
    end = stream._window_end(first)
    steps = (range(start + rank * share, start + (rank + 1) * share) for start in itertools.count(0, global_batch))
    after = next(position for position in itertools.chain.from_iterable(steps) if position >= end)
    following = {int(shard) for shard in stream.shards_at(after)}
    assert set(got) == here | following


def windows(stream: Order, sizes: list[int], epochs: int) -> list[tuple[int, list[int]]]:
    """The end and the shards of each window of some epochs, from the sizes of its shards."""
    found, position = [], 0
    while position < epochs * sum(sizes):
        shards = [int(shard) for shard in stream.shards_at(position)]
        position += sum(sizes[shard] for shard in shards)
        found.append((position, shards))
    return found


@pytest.mark.parametrize("sizes", [[8] * 9, [3] * 7, [7, 8, 1, 9, 5, 6, 4, 2]])
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize(("share", "m"), [(4, 2), (4, 4), (8, 4), (12, 6)])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_read_ahead_turns_to_the_window_of_the_first_sample_behind_and_not_one_earlier_or_later(
    sizes, window, share, m, ranks
):
    """Over all micro-batches of an epoch; some end with a window, and so do some shares. All windows that a micro-batch
    lies in must be named, however small they are.
    """
    stream, batch = order(sizes, 3, window), share * ranks
    there = windows(stream, sizes, epochs=3 + 2 * batch // sum(sizes))
    ends = [end for end, _ in there]
    for step, rank in itertools.product(range(-(-sum(sizes) // batch)), range(ranks)):
        for first in range(step * batch + rank * share, step * batch + (rank + 1) * share, m):
            here = range(bisect.bisect_right(ends, first), bisect.bisect_right(ends, first + m - 1) + 1)
            rest = range(first + m, step * batch + (rank + 1) * share)  # the share's rest, then later shares
            shares = (
                range(at + rank * share, at + (rank + 1) * share) for at in itertools.count((step + 1) * batch, batch)
            )
            after = next(at for at in itertools.chain(rest, *itertools.islice(shares, 99)) if at >= ends[here[-1]])
            wanted = [shard for i in (*here, bisect.bisect_right(ends, after)) for shard in there[i][1]]
            got = stream.coming(first, first + m - 1, share=share, global_batch=batch)
            assert got == list(dict.fromkeys(wanted)), (first, ends)


@given(SHAPES, SEEDS, st.integers(0, 13), st.integers(0, 1000), st.integers(0, 5))
def test_a_replacement_depends_on_the_position_alone_and_stays_in_its_window(sizes, seed, window, position, attempt):
    busy = order(sizes, seed, window)
    busy.samples(17, 100)
    got = busy.replacement(position, attempt)
    assert got == order(sizes, seed, window).replacement(position, attempt)
    owners = np.repeat(np.arange(len(sizes)), sizes)
    assert owners[got] in busy.shards_at(position)


def test_seeds_and_epochs_give_other_orders():
    numbers = [order([100] * 5, seed, 0).samples(start, 500)[1] for seed in (0, 1) for start in (0, 500)]
    for i, one in enumerate(numbers):
        for other in numbers[:i]:
            assert (one == other).mean() < 0.05


def test_only_the_windows_in_reach_are_shuffled():
    tracemalloc.start()
    stream = order([1000] * 1280, 1, 16)
    stream.samples(1_000_000, 64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20  # a whole epoch's permutation would take 10 MB and its keys as much again


def test_planning_an_epoch_of_imagenet_on_1024_ranks_costs_a_second_at_most():
    stream, began = order([1001] * 1280, 1, 16), time.process_time()
    for step in range(1280 * 1001 // 32768):
        stream.samples(step * 32768 + 777 * 32, 32)
    assert time.process_time() - began < 1.0


def test_an_empty_set_is_refused():
    with pytest.raises(DataError, match="holds no samples"):
        order([0, 0], 1, 4)


def displacement(window: int, shards: int = 256, samples: int = 100) -> float:
    """Mean distance between a sample's places in two epochs, as a fraction of the epoch; 1/3 for a random order."""
    total = shards * samples
    stream = order([samples] * shards, 3, window)
    places = [np.argsort(stream.samples(epoch * total, total)[1]) for epoch in range(9)]
    return float(np.mean([np.abs(a - b).mean() for a, b in itertools.pairwise(places)]) / total)


def neighbours(window: int, shards: int = 256, samples: int = 100) -> float:
    """How often two samples in a row come from one shard; 1/shards for a random order."""
    numbers = order([samples] * shards, 3, window).samples(0, shards * samples)[1]
    owners = numbers // samples
    return float((owners[1:] == owners[:-1]).mean())


def test_the_window_shuffle_compared_with_a_full_permutation():
    """docs/data.md quotes these figures."""
    assert displacement(0) == pytest.approx(1 / 3, abs=0.01)
    assert displacement(16) == pytest.approx(1 / 3, abs=0.02)  # permuting the shards alone spreads them that far
    assert neighbours(0) == pytest.approx(1 / 256, abs=0.002)
    assert neighbours(16) == pytest.approx(1 / 16, abs=0.01)  # the price of windows: shards meet more often
    assert neighbours(1) > 0.98


def test_the_hash_spreads_every_bit_of_every_word():
    base = np.arange(4096, dtype=np.uint64)
    for bit in range(0, 40, 3):
        changed = mix(7, base) ^ mix(7, base ^ np.uint64(1 << bit))
        flipped = np.unpackbits(changed.view(np.uint8)).mean()
        assert flipped == pytest.approx(0.5, abs=0.01)
    buckets = np.bincount((mix(7, 3, base, 1) % np.uint64(64)).astype(int), minlength=64)
    assert ((buckets - 64.0) ** 2 / 64).sum() < 120  # chi squared of 63 degrees of freedom: 120 is beyond 1 in 10,000
