"""Bad samples: replaced by position alone, named, counted; too many end the run."""

import io
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import DataConfig
from pipeline.data.loader import Batch, Loader, evaluation_batches
from pipeline.data.samples import flaw
from pipeline.errors import ConfigError, DataError
from tests.support.data_sets import drawn_jpeg, real_jpegs, write_set
from tests.support.image_corpus import jpegs, segment

CPU = torch.device("cpu")
NUM = 30
TRUNCATED, UNDECODABLE, WRONG_LABEL, UNREADABLE = 4, 9, 17, 29


def damaged() -> list[bytes]:
    images = [drawn_jpeg(n) for n in range(NUM)]
    images[TRUNCATED] = images[TRUNCATED][: len(images[TRUNCATED]) // 2]
    images[UNDECODABLE] = b"\xff\xd8" + b"not an image at all" * 20 + b"\xff\xd9"
    return images


def write_damaged(folder: Path) -> None:
    write_set(folder, damaged(), per_shard=6, labels={WRONG_LABEL: 4})
    # The last image of the last shard lies behind the end of its file.
    last = sorted(folder.glob("*.tar"))[-1]
    content = last.read_bytes()
    last.write_bytes(content[: content.index(f"{UNREADABLE:06d}.jpg".encode()) + 600])


@pytest.fixture(scope="module")
def bad_set(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("bad")
    write_damaged(folder / "train")
    write_damaged(folder / "val")
    return DataConfig(
        path=str(folder), image_size=24, global_batch=12, micro_batch=2, window_shards=2, threads=1, max_bad_ratio=1
    )


def change(data: DataConfig, **fields) -> DataConfig:
    return DataConfig(**{name: getattr(data, name) for name in data.__slots__} | fields)


def run(data: DataConfig, start: int, stop: int, *, ranks: int = 1) -> tuple[dict[int, Batch], list[Loader]]:
    batches, loaders = {}, []
    for rank in range(ranks):
        one = Loader(data, seed=5, rank=rank, world_size=ranks, device=CPU)
        for micro_batches in one.steps(start, stop):
            batches |= {batch.position: batch for batch in micro_batches}
        one.close()
        loaders.append(one)
    return batches, loaders


def test_each_kind_is_replaced_counted_and_named(bad_set, caplog):
    with caplog.at_level(logging.WARNING):
        batches, (one,) = run(bad_set, 0, 5)  # two epochs
    assert len(batches) == 30
    assert one.bad.reasons == {
        "train-000000.tar:000004.jpg": "truncated",
        "train-000001.tar:000009.jpg": "undecodable",
        "train-000002.tar:000017.jpg": "label out of range",
        "train-000004.tar:000029.jpg": "unreadable",
    }
    assert one.bad.count >= 8  # each in both epochs, and again where a stand-in was bad too
    named = [record.message for record in caplog.records]
    assert len(named) == 4
    assert "bad sample train-000001.tar:000009.jpg: undecodable; train-" in "\n".join(named)
    assert all("stands in for it at position" in message for message in named)


def test_replacements_are_the_same_on_any_ranks_and_after_a_resume(bad_set):
    whole, _ = run(bad_set, 0, 6)
    for start, ranks in ((0, 3), (2, 1), (3, 2), (5, 6)):
        part, _ = run(bad_set, start, 6, ranks=ranks)
        assert all(torch.equal(batch.images, whole[at].images) for at, batch in part.items())
        assert all(torch.equal(batch.labels, whole[at].labels) for at, batch in part.items())


def test_good_samples_keep_their_place_and_pixels(bad_set, tmp_path):
    write_set(tmp_path / "train", [drawn_jpeg(n) for n in range(NUM)], per_shard=6)
    sound, _ = run(change(bad_set, path=str(tmp_path)), 0, 5)
    replaced, (one,) = run(bad_set, 0, 5)
    differing = sum(
        not torch.equal(a, b)
        for at, batch in sound.items()
        for a, b in zip(batch.images, replaced[at].images, strict=True)
    )
    assert differing == one.bad.count == 8


def test_a_batch_full_of_undecodable_images_does_not_stop_the_stream(bad_set, tmp_path):
    images = [drawn_jpeg(n) for n in range(12)]
    for n in (1, 2, 3, 5, 8, 9, 10):
        images[n] = b"\xff\xd8" + bytes([n]) * 100 + b"\xff\xd9"
    write_set(tmp_path / "train", images, per_shard=12)
    batches, (one,) = run(change(bad_set, path=str(tmp_path), micro_batch=6, prefetch=4), 0, 10)
    assert len(batches) == 20
    assert len(one.bad.reasons) == 7


def test_a_set_without_a_single_good_sample_ends_with_a_name(bad_set, tmp_path):
    write_set(tmp_path / "train", [b"\xff\xd8\xff"] * 6, per_shard=6)
    with pytest.raises(DataError, match=r"train-000000\.tar:00000\d\.jpg is truncated, and so are all"):
        run(change(bad_set, path=str(tmp_path)), 0, 1)


def test_an_evaluation_leaves_bad_samples_out_and_names_them(bad_set, caplog):
    for ranks in (1, 2):
        batches = [b for r in range(ranks) for b in evaluation_batches(bad_set, rank=r, world_size=ranks, device=CPU)]
        assert sum(int(batch.valid.sum()) for batch in batches) == NUM - 4
    assert "val-000000.tar:000004.jpg: truncated; it does not count in the evaluation" in caplog.text
    with pytest.raises(DataError, match=r"4 of 30 samples were bad, more than data\.max_bad_ratio=0\.1"):
        list(evaluation_batches(change(bad_set, max_bad_ratio=0.1), rank=0, world_size=1, device=CPU))


def over(loader: Loader, count: int, step: int) -> bool:
    loader.account(count, step)
    return loader.too_many_bad


def test_over_the_limit_the_error_lists_every_bad_sample(bad_set):
    _, (one,) = run(change(bad_set, max_bad_ratio=0.1), 0, 5)
    assert not over(one, 3, step=1)  # the limit is a tenth of the 30 samples of the first epoch
    assert over(one, 4, step=1)
    assert not over(one, 6, step=5)
    assert over(one, 7, step=5)
    with pytest.raises(DataError) as caught:
        one.refuse_bad(one.bad.reasons)
    message = str(caught.value)
    assert message.startswith(
        "7 of 60 samples were bad, more than data.max_bad_ratio=0.1 allows (1 label out of range, "
    )
    assert all(name in message for name in one.bad.reasons)


def decisions(data: DataConfig, stops: list[int], ranks: list[int]) -> tuple[list[tuple[int, bool]], dict]:
    """Count and decision after every step, in a run that is stopped and resumed at each of `stops`."""
    state, made, start = {}, [], 0
    for stop, size in zip(stops, ranks, strict=True):
        loaders = [Loader(data, seed=5, rank=rank, world_size=size, device=CPU) for rank in range(size)]
        for one in loaders if state else []:
            one.load_state_dict(state)
        streams = [one.steps(start, stop) for one in loaders]
        for step in range(start, stop):
            for stream in streams:
                list(next(stream))
            count = sum(one.bad.count for one in loaders)  # as the ranks' all-reduce sums it
            made.append((count, {over(one, count, step + 1) for one in loaders} == {True}))
        state, start = loaders[0].state_dict(), stop
        for one in loaders:
            one.close()
    return made, state


def test_a_resumed_run_counts_bad_samples_as_an_uninterrupted_one(bad_set):
    data = change(bad_set, max_bad_ratio=0.12)
    straight, state = decisions(data, [8], [1])
    assert [over for _, over in straight[:4]] != [over for _, over in straight[4:]]
    assert decisions(data, [3, 4, 8], [2, 1, 3]) == (straight, state)


def test_a_state_without_an_account_starts_one_and_says_so(bad_set, caplog):
    _, state = decisions(bad_set, [4], [1])
    older = {name: value for name, value in state.items() if not name.startswith("bad_")}
    resumed = Loader(change(bad_set, max_bad_ratio=0.1), seed=5, rank=0, world_size=1, device=CPU)
    resumed.load_state_dict(older)
    assert "has no account of bad samples: data.max_bad_ratio holds from step 4" in caplog.text
    assert not over(resumed, 3, step=5)
    assert over(resumed, 4, step=5)
    saved = resumed.state_dict()
    resumed.load_state_dict(saved)
    assert resumed.bad.count == 4
    assert over(resumed, 7, step=9)
    with pytest.raises(
        DataError, match=r"^7 of 60 samples were bad, .* allows \(4 before the resume, named in the log"
    ):
        resumed.refuse_bad({})
    with pytest.raises(ConfigError, match="loader state has bad_count=-1, not a count"):
        resumed.load_state_dict({**saved, "bad_count": -1})


def test_a_truncated_jpeg_is_known_by_its_missing_end():
    sound = drawn_jpeg(1)
    assert flaw(sound) == ""
    assert flaw(sound + b"\0" * 100) == ""  # padding behind the end is harmless
    assert flaw(sound[:-2]) == "truncated"
    thumbnail = sound[:2] + segment(0xE1, drawn_jpeg(2)) + sound[2:]
    assert flaw(thumbnail) == ""
    assert flaw(thumbnail[:-100]) == "truncated"  # the thumbnail's end is not the image's
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, "PNG")
    assert flaw(buffer.getvalue()) == ""
    assert flaw(buffer.getvalue()[:-12]) == "truncated"


def test_a_header_that_contradicts_itself_is_undecodable_before_a_decoder_sees_it():
    assert flaw(b"\xff\xd8\xff\xe0" + b"not an image at all" * 20 + b"\xff\xd9") == "undecodable"
    assert flaw(b"\xff\xd8\xff\xe0" + b"not an image at all" * 20) == "truncated"


def test_what_lies_behind_a_photograph_does_not_make_it_a_bad_sample(bad_set, tmp_path):
    photographs = [data for name, data in jpegs().items() if "behind" in name or name == "mpf"]
    write_set(tmp_path / "train", photographs, per_shard=len(photographs))
    _, (one,) = run(change(bad_set, path=str(tmp_path)), 0, 3)
    assert one.bad.reasons == {}


@given(st.integers(0, 5), st.floats(0.3, 0.999))
def test_every_cut_of_a_jpeg_is_found(number, kept):
    image = drawn_jpeg(number)
    assert flaw(image[: int(len(image) * kept)]) == "truncated"


def test_no_real_photograph_is_taken_for_truncated():
    images = real_jpegs(100)
    assert not any(map(flaw, images))
    assert {flaw(image[: len(image) * 2 // 3]) for image in images} == {"truncated"}
