"""Images that grow during a run: the size depends on the position alone, not on ranks or the point of resume."""

import dataclasses
import math

import pytest
import torch

from launch.options import parse
from pipeline.config import DataConfig
from pipeline.data.decode.augment import image_size_at
from pipeline.data.loader import Batch, Loader, evaluation_batches
from pipeline.errors import ConfigError
from tests.support.data_sets import drawn_jpeg, write_set

CPU = torch.device("cpu")
SAMPLES, GLOBAL_BATCH = 22, 8
SIDES = [8, 8, 8, 16, 16, 16, 24, 24, 24]  # by step; epochs begin within steps 2, 5 and 8, and count from the next


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("growing")
    write_set(folder / "train", [drawn_jpeg(n, 40 + n, 70 - n) for n in range(SAMPLES)], per_shard=6)
    write_set(folder / "val", [drawn_jpeg(n, 40, 40) for n in range(5)], per_shard=5)
    sizes = {"image_size": 24, "image_size_start": 8, "image_size_ramp": (0.0, 2.0), "image_size_step": 8}
    return DataConfig(path=str(folder), global_batch=GLOBAL_BATCH, micro_batch=2, threads=1, **sizes)


def collect(data: DataConfig, start: int, stop: int, *, ranks: int = 1) -> dict[int, Batch]:
    """Batches of these steps by position; each rank resumes from the state of one that was stopped at `start`."""
    batches: dict[int, Batch] = {}
    for rank in range(ranks):
        loader = Loader(data, seed=3, rank=rank, world_size=ranks, device=CPU)
        for micro_batches in loader.steps(start, stop):
            batches |= {batch.position: batch for batch in micro_batches}
        loader.close()
    return batches


def test_the_side_follows_from_the_step_on_any_number_of_ranks_and_from_any_resume(data):
    whole = collect(data, 0, len(SIDES))
    for position, batch in whole.items():
        step = position // GLOBAL_BATCH
        assert batch.images.shape[2:] == (SIDES[step], SIDES[step]), step
        assert image_size_at(data, step * GLOBAL_BATCH // SAMPLES) == SIDES[step]
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
    for start in (2, 3, 5, 6):
        for ranks in (1, 2):
            part = collect(data, start, len(SIDES), ranks=ranks)
            assert part.keys() == {position for position in whole if position >= start * GLOBAL_BATCH}
            assert all(torch.equal(batch.images, whole[position].images) for position, batch in part.items())


def test_a_step_is_what_a_run_of_that_size_alone_would_see(data):
    whole = collect(data, 0, len(SIDES))
    for side in (8, 16, 24):
        alone = dataclasses.replace(data, image_size=side, image_size_start=0, image_size_ramp=())
        for position, batch in collect(alone, 0, len(SIDES)).items():
            if SIDES[position // GLOBAL_BATCH] == side:
                assert torch.equal(batch.images, whole[position].images)


def test_evaluations_are_at_the_full_size(data):
    for batch in evaluation_batches(data, rank=0, world_size=1, device=CPU):
        assert batch.images.shape[2:] == (24, 24)


def test_the_fast_recipe_grows_in_steps_of_32_to_its_full_size():
    data = parse(["--recipe", "imagenet_sew34_fast"]).data
    sides = [image_size_at(data, epoch) for epoch in range(100)]
    assert sorted(set(sides)) == [128, 160, 192, 224]
    assert sides == sorted(sides)
    assert (sides[0], sides[29], sides[79], sides[80], sides[99]) == (128, 128, 192, 224, 224)
    assert math.floor(sum((side / 224) ** 2 for side in sides)) == 55, "the recipe's text says 56"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"image_size_start": 16},
            "data.image_size_start=16 is not allowed; use 0, or a size below data.image_size=16",
        ),
        ({"image_size_start": 8}, r"data.image_size_ramp=\(\) is not allowed; use two epochs that rise, as in 30,80"),
        ({"image_size_start": 8, "image_size_ramp": (3.0, 3.0)}, r"data.image_size_ramp=\(3.0, 3.0\) is not allowed"),
        ({"image_size_ramp": (0.0, 1.0)}, r"data.image_size_ramp=\(0.0, 1.0\) is not allowed"),
        ({"image_size_step": 0}, "data.image_size_step=0 is not allowed; use an integer of at least 1"),
    ],
)
def test_impossible_growth_is_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        DataConfig(image_size=16, **fields)
