"""Two nodes with their supervisors as PID 1, and faults of every kind: the job ends with the weights of `straight`, an
undisturbed run on one node with two ranks.
"""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from pipeline.errors import EXIT_DONE, EXIT_STOPPED, EXIT_USAGE
from tests.conftest import ROOT
from tests.support.namespaces import Job, Nodes, needs, two_nodes, unavailable
from tests.support.training_runs import arguments
from tests.test_training import assert_same_result

TIMEOUT_S = 20
"""train.timeout_s: longer than a first step takes on a busy machine."""


@pytest.fixture(scope="module", autouse=True)
def _namespaces() -> None:
    if reason := unavailable():
        pytest.skip(f"no network namespaces here: {reason}")


@pytest.fixture
def nodes():
    with two_nodes() as made:
        yield made


class Case:
    """The short run of the digits on two nodes."""

    def __init__(self, nodes: Nodes, digits: Path, folder: Path) -> None:
        self.nodes, self.run_dir = nodes, folder / "run"
        self.train = [*arguments(digits, self.run_dir), "--train.timeout_s", str(TIMEOUT_S)]

    def start(self, *which: int, **options) -> list[Job]:
        return [self.nodes.start(node, train=self.train, **options) for node in which or (0, 1)]


@pytest.fixture
def case(nodes, digits, tmp_path):
    return Case(nodes, digits, tmp_path)


def both_end(jobs: list[Job], code: int = EXIT_DONE) -> None:
    ends = [job.ended() for job in jobs]
    assert ends == [code] * len(jobs), "\n\n".join(job.output for job in jobs)


def told(name: str, seconds: float) -> None:
    """A figure for docs/clusters.md; pytest shows it with -s."""
    print(f"{name}: {seconds:.1f} s")


@pytest.mark.faults
def test_two_nodes_train_as_one_node_of_two_ranks(case, straight):
    both_end(case.start())
    assert_same_result(case.run_dir, straight)


@pytest.mark.faults
@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize("what", ["launch/train.py", "deepspeed.launcher.launch", "deepspeed.launcher.runner"])
def test_sigkill_of_a_rank_or_of_its_launcher(case, straight, node, what):
    jobs = case.start()
    jobs[0].until(r"^step +7/")
    for pid in jobs[node].inside(rf"^\S+python\S* (-u )?(-m )?{re.escape(what)}|-u {re.escape(str(ROOT / what))}"):
        os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    if what == "launch/train.py":  # without their launcher the ranks train on until the supervisor sees that it is gone
        jobs[0].until(r"resumed from the checkpoint after step 5")
        told(f"SIGKILL of {what} on node {node} to training again", jobs[0].until(r"^step +6/")[0] - began)
    both_end(jobs)
    assert_same_result(case.run_dir, straight)
    assert what != "launch/train.py" or "restart 1 of 3" in jobs[node].output


@pytest.mark.faults
@pytest.mark.parametrize("node", [0, 1])
def test_sigkill_of_a_whole_node_that_comes_back(case, straight, node):
    jobs = case.start()
    jobs[0].until(r"^step +7/")
    jobs[node].kill_node()
    began = time.monotonic()
    jobs[node] = case.start(node)[0]
    jobs[0].until(r"resumed from the checkpoint after step 5")
    told(f"SIGKILL of node {node} to training again", jobs[0].until(r"^step +6/")[0] - began)
    both_end(jobs)
    assert_same_result(case.run_dir, straight)


@pytest.mark.faults
@pytest.mark.parametrize("how", ["link down", "one way", "power"])
def test_a_link_that_falls_silent_is_noticed_and_the_job_goes_on_when_it_is_back(case, straight, how):
    needs("nft")
    jobs = case.start()
    jobs[0].until(r"^step +7/")
    if how == "link down":
        case.nodes.on(1, "ip", "link", "set", "eth0", "down")
    else:  # what node 0 sends does not arrive; what it receives does
        case.nodes.on(
            1, "nft", "add table inet cut; add chain inet cut in { type filter hook input priority 0; policy drop; }"
        )
    began = time.monotonic()
    if how == "power":
        case.nodes.on(1, "nft", "add chain inet cut out { type filter hook output priority 0; policy drop; }")
        jobs[1].kill_node()
    noticed = jobs[0].until(r"restart 1 of 3")[0] - began
    told(f"{how}: noticed by node 0, train.timeout_s={TIMEOUT_S}", noticed)
    if how == "link down":
        case.nodes.on(1, "ip", "link", "set", "eth0", "up")
    else:
        case.nodes.on(1, "nft", "delete table inet cut")
    began = time.monotonic()
    if how == "power":
        jobs[1] = case.start(1)[0]
    jobs[0].until(r"resumed from the checkpoint after step 5")
    told(f"{how}: from the link's return to training again", jobs[0].until(r"^step +6/")[0] - began)
    both_end(jobs)
    assert_same_result(case.run_dir, straight)


@pytest.mark.faults
def test_a_slow_link_only_takes_longer(case, straight):
    needs("tc")
    for node in (0, 1):
        case.nodes.on(
            node, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "4mbit", "burst", "32k", "latency", "2s"
        )
    both_end(case.start())
    assert_same_result(case.run_dir, straight)


@pytest.mark.faults
def test_a_node_that_comes_late_and_one_that_is_stopped_for_both(case, straight):
    jobs = case.start(1)
    while not (case.run_dir / ".node-1").exists():
        assert jobs[0].process.poll() is None
    jobs = [*case.start(0), *jobs]
    jobs[0].until(r"^step +6/")
    os.kill(jobs[1].first, signal.SIGTERM)
    both_end(jobs, EXIT_STOPPED)
    assert "stopped on request after step" in jobs[0].output
    both_end(case.start())
    assert_same_result(case.run_dir, straight)


@pytest.mark.faults
def test_another_number_of_nodes_or_another_code_on_one_node_is_refused(case, tmp_path):
    both_end([*case.start(0), case.nodes.start(1, "--nodes", "4", train=case.train)], EXIT_USAGE)
    copy = tmp_path / "copy"
    for room in ("pipeline", "launch"):
        shutil.copytree(ROOT / room, copy / room)
    (copy / "pipeline" / "cores.py").open("a").write("# another version\n")
    jobs = [*case.start(0), case.nodes.start(1, train=case.train, cwd=copy)]
    both_end(jobs, EXIT_USAGE)
    for job in jobs:
        assert re.search(
            r"^error: code version is \w+ on node 1 \(node-1\) and \w+ on node 0 \(node-0\)", job.output, re.M
        )


@pytest.mark.faults
def test_other_data_on_one_node_are_refused(case, digits, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(digits, other)
    for split in ("train", "val"):  # in one alone the splits would not fit each other, which is told first
        manifest = other / split / "manifest.json"
        document = json.loads(manifest.read_text())
        document["classes"].reverse()
        manifest.write_text(json.dumps(document))
    jobs = [*case.start(0), case.nodes.start(1, train=[*case.train, "--data.path", str(other)])]
    both_end(jobs, EXIT_USAGE)
    for job in jobs:
        assert re.search(r"^error: data's identity is \w+ on node 1 \(node-1\) and \w+ on node 0", job.output, re.M)


@pytest.mark.faults
def test_other_options_on_one_node_are_refused_by_the_ranks(case):
    """This holds for an option that changes no result too: on logged steps the ranks exchange their times."""
    jobs = [*case.start(0), case.nodes.start(1, train=[*case.train, "--train.log_every", "3"])]
    both_end(jobs, EXIT_USAGE)
    assert "error: the ranks do not agree: the configurations differ; start every node" in jobs[0].output
