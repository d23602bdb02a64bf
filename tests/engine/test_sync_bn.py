"""Batch normalisation over ranks is that of one process with the joint batch, in the definition and in the twins."""

import dataclasses

import pytest

from launch.options import parse
from pipeline.errors import ConfigError
from pipeline.run_dir import run_folder
from tests.conftest import launch
from tests.support.rank_lines import told


@pytest.fixture(scope="module")
def cases() -> dict[str, dict]:
    done = launch("tests/engine/sync_bn_ranks.py", ranks=2)
    assert done.returncode == 0, done.output
    lines = told(done.output, "CASE")
    return {line.pop("kind"): line for line in lines}


@pytest.mark.parametrize("kind", ["sew_tiny if False", "sew_tiny plif True", "ms_tiny lif True"])
def test_a_network_over_ranks_steps_as_one_with_the_joint_batch(kind, cases):
    got = cases[f"network {kind}"]
    assert got["off"] < 1e-9 < 1e-3 < got["apart"], "in doubles, two steps; and what normalising apart would give"


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    ("run", "tolerance"),
    [
        ("run_reference float64", 1e-12),
        # The sums of a channel have 420 fp32 terms, and y has a mean of 2.5 deviations.
        ("run_reference float32", 2e-5),
        ("run float32", 2e-5),
    ],
)
def test_a_layer_over_ranks_has_the_joint_output_gradients_and_statistics(run, tolerance, static, cases):
    if run.startswith("run float") and not cases["twin"]["there"]:
        pytest.skip("no C++ compiler, so there is no twin")
    assert max(cases[f"layer {run} {static}"]["off"]) < tolerance


@pytest.mark.parametrize("of", ["sew_tiny 0", "sew_tiny 1", "sew_tiny 2", "sew_tiny 3", "ms_tiny 3"])
def test_ranks_of_an_engine_end_with_the_same_running_statistics(of, cases):
    assert cases[f"engine {of}"]["same"]
    assert cases[f"engine {of}"]["moved"] > 0


def test_a_policy_that_looks_at_each_ranks_potentials_is_refused():
    with pytest.raises(ConfigError, match="'ds_atgo' looks at potentials that each rank normalises by itself"):
        parse(["--recipe", "digits", "--train.sync_bn", "true", "--chi.policy", "ds_atgo"])


def test_a_run_goes_on_with_its_own_number_of_ranks_alone(tmp_path):
    config = parse(["--recipe", "digits", "--train.sync_bn", "true", "--run_dir", str(tmp_path)])
    run_folder.describe(config, data_identity="d", classes=["a"], layers=["l"], num_parameters=1, world_size=2)
    assert run_folder.admit(config, 2) is None
    with pytest.raises(ConfigError, match="needs the 2 that it was started with, not world_size=4"):
        run_folder.admit(config, 4)
    apart = dataclasses.replace(config, run_dir=str(tmp_path / "apart"), train=parse(["--recipe", "digits"]).train)
    run_folder.admit(apart, 2)
    run_folder.describe(apart, data_identity="d", classes=["a"], layers=["l"], num_parameters=1, world_size=2)
    assert run_folder.admit(apart, 4) is None
