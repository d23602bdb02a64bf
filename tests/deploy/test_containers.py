"""The image that podman builds from the Dockerfile as it stands: two containers are the two nodes of a run."""

import os
import subprocess
from collections.abc import Iterator

import pytest

from pipeline.errors import EXIT_DONE, EXIT_STOPPED
from tests.deploy.engine import IMAGE, Container, Engine, engine
from tests.deploy.packages import need
from tests.support.namespaces import Nodes, two_nodes, unavailable

pytestmark = pytest.mark.deploy
USER = 10001


@pytest.fixture(scope="module")
def podman(tmp_path_factory) -> Iterator[Engine]:
    need("podman", "crun", "debootstrap")
    if reason := unavailable():
        pytest.skip(f"no network namespaces here: {reason}")
    folder = tmp_path_factory.mktemp("podman")
    with engine(folder) as made:
        made.build()
        yield made


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with two_nodes() as made:
        yield made


@pytest.fixture
def pair(podman, nodes, digits, tmp_path) -> Iterator[list[Container]]:
    """Two containers, not started, of a run of the digits with a checkpoint every 20 steps."""
    runs = tmp_path / "runs"
    runs.mkdir()
    os.chown(runs, USER, USER)
    subprocess.run(["chmod", "-R", "a+rX", digits], check=True)
    small = "--data.image_size 8 --train.log_every 1 --train.checkpoint_every 20 --train.epochs 12"
    words = ["--recipe", "digits", "--data.path", "/data/digits", "--run_dir", "/runs/digits", *small.split()]
    volumes = {digits: "/data/digits:ro", runs: "/runs"}
    made = [Container(podman, node, nodes.names[node], volumes, words) for node in (0, 1)]
    yield made
    podman("rm", "--force", "--time", "0", *(one.name for one in made))


def test_the_image_says_what_it_runs_as_nobody_and_how_large_it_is(podman):
    assert "usage: python -m launch.supervise" in podman("run", "--rm", "--network", "none", IMAGE)
    words = ["--rm", "--network", "none", "--entrypoint", "id", IMAGE, "--user"]
    assert podman("run", *words).split()[-1] == str(USER)
    size = podman.size_bytes()
    print(f"the CPU image: {size / 1e9:.2f} GB")
    assert size < 3.5e9


def test_stop_of_one_container_stops_both_with_a_checkpoint_and_they_go_on(pair, tmp_path):
    for one in pair:
        one.start()
    pair[0].until("step   25/")
    pair[1].stop()
    assert [one.ended() for one in pair] == [EXIT_STOPPED] * 2, pair[0].output[-4000:]
    assert "stopped on request after step" in pair[0].output
    for one in pair:
        one.start()
    assert [one.ended() for one in pair] == [EXIT_DONE] * 2, pair[0].output[-4000:]
    assert "resumed from the checkpoint after step" in pair[0].output
    assert (tmp_path / "runs/digits/summary.json").stat().st_uid == USER


@pytest.mark.parametrize("node", [0, 1])
def test_kill_of_a_container_that_is_started_again_costs_what_came_after_the_last_checkpoint(pair, node, tmp_path):
    for one in pair:
        one.start()
    pair[0].until("step   25/")
    pair[node].kill()
    pair[node].start()
    assert [one.ended() for one in pair] == [EXIT_DONE] * 2, pair[0].output[-4000:]
    assert "resumed from the checkpoint after step 20" in pair[0].output
    assert "restart 1 of 3" in pair[1 - node].output
    assert (tmp_path / "runs/digits/summary.json").exists()
