"""Frames of events: the fast way makes the counts of the definition, and SpikingJelly's; batches of them are exact."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import DataConfig
from pipeline.data.decode.event_frames import (
    LARGEST_COUNT,
    FrameForm,
    Views,
    count_into,
    frames,
    random_views,
    whole_views,
)
from pipeline.data.decode.events import Events, decode
from pipeline.data.loader import Batch, Loader, evaluation_batches
from pipeline.data.manifest import check_splits
from pipeline.errors import ConfigError
from tests.support import peers
from tests.support.data_sets import drawn_jpeg, drawn_recording, same, write_set

CPU = torch.device("cpu")
T = 3


def fast(events: Events, form: FrameForm, views: Views, index: int = 0) -> np.ndarray:
    out = np.full((form.T, form.size, form.size, 2), -1, dtype=np.int16)  # poisoned
    count_into(out, events, form, views, index)
    return out.transpose(0, 3, 1, 2)


def of(t, x, y, p, *, width: int, height: int) -> Events:
    types = (np.int64, np.uint16, np.uint16, np.uint8)
    t, x, y, p = (np.asarray(column, dtype=kind) for column, kind in zip((t, x, y, p), types, strict=True))
    return Events(t, x, y, p, width, height)


@st.composite
def recordings(draw) -> Events:
    n, width, height = draw(st.integers(1, 60)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    t = np.sort(rng.integers(0, draw(st.sampled_from((1, 5, 50, 10**6))), n))
    columns = rng.integers(0, width, n), rng.integers(0, height, n), rng.integers(0, 2, n)
    return of(t - t[0], *columns, width=width, height=height)


@settings(deadline=None, max_examples=300)
@given(
    events=recordings(),
    T=st.integers(1, 9),
    size=st.integers(1, 45),
    split_by=st.sampled_from(("time", "count")),
    shift=st.tuples(st.integers(-9, 9), st.integers(-9, 9)),
    flip=st.booleans(),
    drop=st.sampled_from((0.0, 0.3, 0.9999)),
    key=st.integers(0, 2**64 - 1),
)
def test_the_fast_way_counts_as_the_definition_does(events, T, size, split_by, shift, flip, drop, key):
    views = Views(np.array([shift]), np.array([flip]), np.array([drop]), np.array([key], dtype=np.uint64))
    form = FrameForm(T, size, split_by)
    expected = frames(events, form, views, 0)
    got = fast(events, form, views)
    assert got.dtype == expected.dtype == np.int16
    assert np.array_equal(got, expected)


def test_a_definition_worked_out_by_hand():
    # A sensor of 4 x 2 in frames of 2 x 2: cells of 2 x 2 pixels, one empty row of pixels above and one below.
    events = of([0, 1, 5, 6, 9, 10], [0, 1, 3, 3, 2, 0], [0, 1, 0, 0, 1, 1], [1, 1, 0, 0, 1, 0], width=4, height=2)
    expected = np.zeros((2, 2, 2, 2), int)
    expected[0, 1, 0, 0] = 1  # (0, 0): y=0 is the second of four rows
    expected[0, 1, 1, 0] = 1  # (1, 1)
    expected[1, 0, 0, 1] = 2  # twice (3, 0) at 5 and 6 µs, after the middle of 0 to 10 µs
    expected[1, 1, 1, 1] = 1
    expected[1, 0, 1, 0] = 1
    assert np.array_equal(frames(events, FrameForm(2, 2, "time"), whole_views(1), 0), expected)
    expected[1, 0, 0, 1] = expected[0, 0, 0, 1] = 1  # the third of six events is in the first half
    assert np.array_equal(frames(events, FrameForm(2, 2, "count"), whole_views(1), 0), expected)


@pytest.mark.parametrize(("ours", "theirs"), [("time", "time"), ("count", "number")])
def test_frames_are_those_of_spikingjelly(ours, theirs):
    peer = peers.spikingjelly_frames()
    for number in range(20):
        events = decode(drawn_recording(number, num_events=200 + 37 * number))
        expected = peer.integrate_events_by_fixed_frames_number(events._asdict(), theirs, 7, 34, 34)
        assert np.array_equal(fast(events, FrameForm(7, 34, ours), whole_views(1)), expected)


def test_every_event_is_counted_once_where_nothing_is_moved_or_dropped():
    events = decode(drawn_recording(3, 60, 100))
    for size in (20, 33, 100, 128):
        assert fast(events, FrameForm(5, size, "time"), whole_views(1)).sum() == len(events.t)


def test_a_hot_pixel_stops_at_what_fp16_and_the_transfer_hold():
    n = LARGEST_COUNT + 5
    events = of(np.arange(n), np.zeros(n), np.zeros(n), np.ones(n), width=1, height=1)
    assert fast(events, FrameForm(1, 1, "time"), whole_views(1)).tolist() == [[[[0]], [[LARGEST_COUNT]]]]


def test_views_are_a_function_of_seed_epoch_and_sample_and_cover_their_ranges():
    epochs, samples = np.repeat(np.arange(2), 2000), np.tile(np.arange(2000), 2)
    views = random_views(3, epochs, samples, shift=2, flip=True, drop=0.5)
    assert [np.unique(axis).tolist() for axis in views.shifts.T] == [[-2, -1, 0, 1, 2]] * 2
    assert all(0.18 < (axis == value).mean() < 0.22 for axis in views.shifts.T for value in range(-2, 3))
    assert 0.47 < views.flips.mean() < 0.53
    assert 0 <= views.drops.min() < 0.01
    assert 0.49 < views.drops.max() < 0.5
    assert len(np.unique(views.keys)) == 4000  # an event's fate is another one in another epoch
    one = random_views(3, epochs[2017:2018], samples[2017:2018], shift=2, flip=True, drop=0.5)
    assert all(np.array_equal(part[2017:2018], same) for part, same in zip(views, one, strict=True))
    neutral = random_views(3, epochs, samples, shift=0, flip=False, drop=0.0)
    assert not neutral.shifts.any()
    assert not neutral.flips.any()
    assert not neutral.drops.any()


@pytest.fixture(scope="module")
def moving(tmp_path_factory) -> DataConfig:
    """30 recordings of two sensors in shards of 7, and 13 to evaluate."""
    folder = tmp_path_factory.mktemp("moving")
    write_set(folder / "train", [drawn_recording(n, 34, 34 + 6 * (n % 2)) for n in range(30)], per_shard=7)
    write_set(folder / "val", [drawn_recording(n) for n in range(13)], per_shard=5)
    return DataConfig(
        path=str(folder),
        image_size=17,
        global_batch=12,
        micro_batch=2,
        window_shards=2,
        threads=1,
        event_shift=2,
        event_drop=0.3,
    )


def change(data: DataConfig, **fields) -> DataConfig:
    return DataConfig(**{name: getattr(data, name) for name in data.__slots__} | fields)


def collect(data: DataConfig, start: int, stop: int, *, ranks: int = 1, seed: int = 5) -> dict[int, Batch]:
    """The batches of these steps on all ranks, by position."""
    batches: dict[int, Batch] = {}
    for rank in range(ranks):
        one = Loader(data, seed=seed, rank=rank, world_size=ranks, device=CPU, T=T)
        for micro_batches in one.steps(start, stop):
            batches |= {batch.position: batch for batch in micro_batches}
        one.close()
    return batches


def test_a_batch_holds_the_frames_of_its_samples(moving):
    """Each sample of a batch is the definition's frames of one recording, under the view of its epoch."""
    batches = collect(moving, 0, 5)  # two epochs
    assert len(batches) == 30
    form, seen = FrameForm(T, 17, "time"), set()
    for position, batch in batches.items():
        assert batch.images.shape == (T, 2, 2, 17, 17)
        assert batch.images.dtype == torch.float32
        assert batch.images.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        for slot in range(2):
            epoch, got = (position + slot) // 30, batch.images[:, slot].numpy()
            for n in range(30):
                view = random_views(5, np.array([epoch]), np.array([n]), shift=2, flip=True, drop=0.3)
                events = decode(drawn_recording(n, 34, 34 + 6 * (n % 2)))
                if np.array_equal(fast(events, form, view), got):
                    assert batch.labels[slot] == n % 4
                    seen.add((epoch, n))
    assert len(seen) == 60


def test_frames_are_the_same_on_any_ranks_threads_and_after_a_resume(moving):
    whole = collect(moving, 0, 6)
    assert not same(whole, collect(moving, 0, 6, seed=6))
    for start, ranks, threads in ((0, 3, 1), (0, 1, 3), (2, 1, 1), (3, 2, 2), (5, 6, 1)):
        part = collect(change(moving, threads=threads), start, 6, ranks=ranks)
        assert same(part, {at: batch for at, batch in whole.items() if at >= start * 12})


def test_frames_come_in_the_dtype_that_was_asked_for(moving):
    one = Loader(moving, seed=5, rank=0, world_size=1, device=CPU, dtype=torch.bfloat16, T=T)
    batch = next(next(one.steps(0, 1)))
    one.close()
    assert batch.images.dtype == torch.bfloat16
    assert torch.equal(batch.images.float(), collect(moving, 0, 1)[0].images)


def test_an_evaluation_sees_every_recording_once_and_whole(moving):
    for ranks in (1, 2, 3):
        got = []
        for rank in range(ranks):
            for batch in evaluation_batches(moving, rank=rank, world_size=ranks, device=CPU, T=T):
                got += batch.images[:, batch.valid].unbind(1)
        assert len(got) == 13
        for n, image in enumerate(got):
            expected = fast(decode(drawn_recording(n)), FrameForm(T, 17, "time"), whole_views(1))
            assert np.array_equal(image.numpy(), expected)


def damaged(count: int = 30) -> list[bytes]:
    samples = [drawn_recording(n) for n in range(count)]
    samples[4] = samples[4][:-10]  # cut
    samples[9] = samples[9][:100] + bytes([samples[9][100] ^ 1]) + samples[9][101:]  # a bit has turned
    samples[17] = drawn_jpeg(17)
    return samples


def test_damaged_recordings_are_replaced_counted_and_named(moving, tmp_path, caplog):
    write_set(tmp_path / "train", damaged(), per_shard=6, labels={22: 4})
    write_set(tmp_path / "val", damaged(), per_shard=6)
    data = change(moving, path=str(tmp_path), max_bad_ratio=1)
    one = Loader(data, seed=5, rank=0, world_size=1, device=CPU, T=T)
    with caplog.at_level(logging.WARNING):
        whole = {batch.position: batch for micro_batches in one.steps(0, 5) for batch in micro_batches}
    one.close()
    assert one.bad.reasons == {
        "train-000000.tar:000004.events": "undecodable",
        "train-000001.tar:000009.events": "undecodable",
        "train-000002.tar:000017.events": "undecodable",
        "train-000003.tar:000022.events": "label out of range",
    }
    assert one.bad.count >= 8
    assert len(caplog.records) == 4
    assert same(collect(data, 3, 5, ranks=3), {at: batch for at, batch in whole.items() if at >= 36})
    batches = list(evaluation_batches(data, rank=0, world_size=1, device=CPU, T=T))
    assert sum(int(batch.valid.sum()) for batch in batches) == 27


def test_options_of_the_other_kind_are_refused_with_the_cure(moving, tmp_path):
    check_splits(moving)
    fields = {"crop_area_min": 0.5, "crop_aspect": 1.0, "eval_resize": 20, "hw_decoder_load": 0.5}
    for field, value in fields.items():
        cure = rf"data\.{field}={value} is for images, and .*train holds event recordings; use "
        with pytest.raises(ConfigError, match=cure):
            check_splits(change(moving, **{field: value}))
    growing = change(moving, image_size_start=8, image_size_ramp=(0.0, 2.0))
    with pytest.raises(ConfigError, match=r"data\.image_size_start=8 is for images"):
        Loader(growing, seed=0, rank=0, world_size=1, device=CPU, T=T)
    for split in ("train", "val"):
        write_set(tmp_path / split, [drawn_jpeg(n) for n in range(6)], per_shard=6)
    with pytest.raises(ConfigError, match=r"data\.event_shift=2 is for event recordings, and .*train holds images; "):
        check_splits(change(moving, path=str(tmp_path)))
    write_set(tmp_path / "val", [drawn_recording(n) for n in range(6)], per_shard=6)
    with pytest.raises(ConfigError, match=r"holds images to train on, and events to evaluate; make both splits of the"):
        check_splits(DataConfig(path=str(tmp_path)))


def test_the_number_of_frames_must_be_given(moving):
    with pytest.raises(TypeError, match="holds event recordings; give the loader T"):
        Loader(moving, seed=0, rank=0, world_size=1, device=CPU)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("event_frames", "number", "one of time, count"),
        ("event_shift", 16, "an integer from 0 to data.image_size - 1 = 15"),
        ("event_shift", -1, "an integer from 0"),
        ("event_drop", 1.0, r"a number in \[0, 1\)"),
    ],
)
def test_a_value_out_of_range_is_refused(field, value, allowed):
    with pytest.raises(ConfigError, match=rf"data\.{field}={value!r} is not allowed; use {allowed}"):
        DataConfig(**{field: value})
