"""The image that podman builds from the Dockerfile as it stands: two containers are the two nodes of a run."""

import copy
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.errors import EXIT_DONE, EXIT_STOPPED
from tests.deploy.engine import IMAGE, Container, Engine, engine
from tests.deploy.packages import need
from tests.support.manifests import one, render, workloads
from tests.support.namespaces import Nodes, two_nodes, unavailable

pytestmark = pytest.mark.deploy
USER = 10001


@pytest.fixture(scope="module")
def podman(tmp_path_factory) -> Iterator[Engine]:
    need("podman", "crun", "debootstrap", "catatonit")
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
    small = "--data.image_size 8 --train.log_every 1 --train.checkpoint_every 20 --train.epochs 20"
    words = ["--recipe", "digits", "--data.path", "/data/digits", "--run_dir", "/runs/digits", *small.split()]
    volumes = {digits: "/data/digits:ro", runs: "/runs"}
    made = [Container(podman, node, nodes.names[node], volumes, words) for node in (0, 1)]
    yield made
    podman("rm", "--force", "--time", "0", *(node.name for node in made))


def test_the_image_says_what_it_runs_as_nobody_and_how_large_it_is(podman):
    assert "usage: python -m launch.supervise" in podman("run", "--rm", "--network", "none", IMAGE)
    words = ["--rm", "--network", "none", "--entrypoint", "id", IMAGE, "--user"]
    assert podman("run", *words).split()[-1] == str(USER)
    size = podman.size_bytes()
    print(f"the CPU image: {size / 1e9:.2f} GB")
    assert size < 3.5e9


def test_stop_of_one_container_stops_both_with_a_checkpoint_and_they_go_on(pair, tmp_path):
    for node in pair:
        node.start()
    pair[0].until("step +25/")
    pair[1].stop()
    assert [node.ended() for node in pair] == [EXIT_STOPPED] * 2, pair[0].output[-4000:]
    assert "stopped on request after step" in pair[0].output
    for node in pair:
        node.start()
    assert [node.ended() for node in pair] == [EXIT_DONE] * 2, pair[0].output[-4000:]
    assert "resumed from the checkpoint after step" in pair[0].output
    assert (tmp_path / "runs/digits/summary.json").stat().st_uid == USER


@pytest.mark.parametrize("killed", [0, 1])
def test_kill_of_a_container_that_is_started_again_costs_what_came_after_the_last_checkpoint(pair, killed, tmp_path):
    for node in pair:
        node.start()
    pair[0].until("step +25/")
    pair[killed].kill()
    pair[killed].start()
    assert [node.ended() for node in pair] == [EXIT_DONE] * 2, pair[0].output[-4000:]
    assert re.search("resumed from the checkpoint after step [1-9][0-9]*0$", pair[0].output, re.M)
    assert "restart 1 of 3" in pair[1 - killed].output
    assert (tmp_path / "runs/digits/summary.json").exists()


def pod(index: int) -> dict:
    """Pod `index` of the overlay cpu-smoke, as the controller of an Indexed Job makes it.

    What podman 4 lacks is done for it: no $(NAME) in a value, no network of pods but the host's.
    """
    (workload,) = workloads(render("overlays/cpu-smoke"))
    spec = {**copy.deepcopy(workload.pod), "hostNetwork": True}
    (container,) = spec["containers"]
    del container["ports"]  # not with the host's network
    for entry in container["env"]:
        if "value" in entry:
            entry["value"] = entry["value"].replace("$(JOB_NAME)", workload.job)
    container["env"].append({"name": "JOB_COMPLETION_INDEX", "value": str(index)})
    labels = {"batch.kubernetes.io/job-name": workload.job}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"{workload.job}-{index}", "labels": labels},
        "spec": spec,
    }


def test_the_pods_of_the_smoke_overlay_pack_train_and_finish(podman, nodes, tmp_path):
    objects = render("overlays/cpu-smoke")
    claim, run = one(objects, "PersistentVolumeClaim", "chispike-smoke-runs"), one(objects, "ConfigMap", "chispike-run")
    run = {**run, "data": {**run["data"], "OVERRIDES": f"{run['data']['OVERRIDES']} --train.epochs 2"}}
    try:
        for name, documents in (("claim", [claim]), ("0", [run, pod(0)]), ("1", [run, pod(1)])):
            path = tmp_path / f"{name}.yaml"
            path.write_text(yaml.safe_dump_all(documents))
            network = nodes.names[int(name)] if name.isdigit() else ""
            podman("kube", "play", str(path), network=network, timeout=300)
        codes = [podman("wait", f"chispike-{index}-node", timeout=400).split()[-1] for index in (0, 1)]
        said = podman("logs", "chispike-0-node")
        assert codes == ["0", "0"], said[-4000:]
        assert "digits: 2 ranks on cpu" in said
        (volume,) = json.loads(podman("volume", "inspect", "chispike-smoke-runs"))
        assert Path(volume["Mountpoint"], "digits/summary.json").stat().st_uid == USER
    finally:
        podman("pod", "rm", "--all", "--force", "--time", "0")
        podman("volume", "rm", "--all", "--force")
