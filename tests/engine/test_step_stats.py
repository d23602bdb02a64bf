"""What a skipped step undoes, and how many may come in a row, in one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from launch.options import parse
from pipeline.chi.indicators import PER_LAYER, Indicators
from pipeline.chi.tap import Reading
from pipeline.data.loader import Loader
from pipeline.engine.step_stats import NonFinite
from pipeline.errors import NonFiniteError

CPU = torch.device("cpu")
BROKEN = "the gradient is not finite"


def reading(*, skipped: bool, nonfinite: str = "") -> Reading:
    indicators = Indicators(**dict.fromkeys(PER_LAYER, torch.ones(1)), network_chi=torch.ones(()))
    nothing = torch.zeros(())
    return Reading(
        indicators=indicators,
        loss=nothing,
        correct=nothing,
        flags=nothing,
        widths=torch.ones(1),
        skipped=skipped,
        nonfinite=nonfinite,
    )


@pytest.fixture
def begin(digits, tmp_path):
    """`NonFinite` of a batch normalisation, in a group of one rank."""
    data = parse(["--recipe", "digits", "--data.path", str(digits)]).data
    loader = Loader(data, seed=0, rank=0, world_size=1, device=CPU)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield lambda norm, **given: NonFinite(norm, loader, micro_batch=16, world_size=1, **given)
    dist.destroy_process_group()
    loader.close()


def test_an_overflow_in_the_forward_pass_leaves_the_running_statistics_as_they_stood_before_the_step(begin):
    norm = nn.BatchNorm2d(3)
    mean = norm.running_mean
    assert mean is not None
    judge = begin(norm, skips=0, fp16=True)
    mean.fill_(0.25)  # as a save does, which averages them over the ranks
    judge.begin()
    norm(torch.ones(2, 3, 4, 4))
    assert judge.judge(1, reading(skipped=False)) is None
    before = mean.clone()
    judge.begin()
    norm(torch.full((2, 3, 4, 4), float("inf")))
    assert judge.judge(2, reading(skipped=True)) is None
    assert torch.equal(mean, before)
    assert mean[0] == pytest.approx(0.25 * 0.9 + 0.1)


def test_a_resumed_run_goes_on_counting_the_steps_that_it_skipped(begin):
    judge = begin(nn.BatchNorm2d(3), skips=2, fp16=False)
    judge.load_state_dict({"in_a_row": 1})
    skipped = judge.judge(8, reading(skipped=True, nonfinite=BROKEN))
    assert skipped.line.endswith("skipped, 2 of 2 in a row")
    assert judge.state_dict() == {"in_a_row": 2}
    with pytest.raises(NonFiniteError, match=r"^step 9: .*, the last of 3 such steps in a row; no update"):
        judge.judge(9, reading(skipped=True, nonfinite=BROKEN))
