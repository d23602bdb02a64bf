"""The job script of docs/clusters.md in a real Slurm of two nodes, with both ways in which Slurm tracks processes."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.deploy import slurm as daemons
from tests.deploy.packages import need
from tests.deploy.slurm import Slurm, cluster
from tests.launch.test_ways_to_start import block
from tests.support.namespaces import two_nodes, unavailable
from tests.support.supervised import NEUTRAL

pytestmark = pytest.mark.deploy
EPOCHS = 100
"""About two minutes of training on two cores: the warning of Slurm's time limit comes within them."""
ENDS = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED"}


@pytest.fixture(scope="module", params=["linuxproc", "cgroup"])
def slurm(request, tmp_path_factory) -> Iterator[Slurm]:
    need("slurmctld", "slurmd", "sbatch", "munged")
    if reason := unavailable() or daemons.unavailable():
        pytest.skip(f"no namespaces or no control groups of version 1 here: {reason}")
    with two_nodes() as nodes, cluster(nodes, tmp_path_factory.mktemp("slurm") / "cluster", request.param) as made:
        yield made


class Case:
    """A job of the page's script that trains the digits on two nodes of one rank each."""

    def __init__(self, slurm: Slurm, digits: Path, folder: Path) -> None:
        self.slurm, self.folder, self.run_dir = slurm, folder, folder / "run"
        small = "--data.image_size 8 --train.log_every 5 --train.eval_every_epochs 50"
        self._options = f"--data.path {digits} --run_dir {self.run_dir} --train.epochs {EPOCHS} {small}"

    def submit(self, *options: str) -> str:
        script = block("sh", "#SBATCH").replace("imagenet_sew34_chi", f"digits {self._options}")
        script = script.replace(" python ", f" {sys.executable} ").replace("supervise ", "supervise --slots 1 ")
        variables = {**NEUTRAL, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "eth0"}
        variables["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // 2))
        here = ["--nodes", "2", "--gpus-per-node", "0", "--cpus-per-task", "1", *options]
        number = self.slurm.submit(script, *here, cwd=self.folder, variables=variables)
        self.slurm.until(number, {"RUNNING"}, 60)
        return number

    def log(self, number: str) -> str:
        return (self.folder / f"slurm-{number}.out").read_text()


@pytest.fixture
def case(slurm, digits, tmp_path) -> Case:
    return Case(slurm, digits, tmp_path)


def test_a_job_at_its_time_limit_saves_is_queued_again_and_finishes(case):
    """The warning comes before the limit, as `--signal` asks; the first start's lines stay in the log."""
    number = case.submit("--time", "3", "--signal", "USR1@90")
    job = case.slurm.until(number, {"PENDING", *ENDS}, 200)  # pending: queued again
    if job["JobState"] == "PENDING":
        case.slurm("scontrol", "update", f"JobId={number}", "TimeLimit=60")
    job = case.slurm.until(number, ENDS, 500)
    log = case.log(number)
    assert job["JobState"] == "COMPLETED", log[-6000:]
    assert job["Restarts"] == "1", log[-6000:]
    assert "SIGUSR1 received: the ranks save and stop" in log
    before, _, after = log.partition("resumed from the checkpoint after step")
    assert "stopped on request after step" in before
    assert "has finished" in after
    assert (case.run_dir / "summary.json").exists()


def test_scancel_saves_a_checkpoint_and_the_job_stays_cancelled(case):
    number = case.submit("--time", "20")
    log = case.folder / f"slurm-{number}.out"
    case.slurm.until_said(log, "step +20/", 120)
    case.slurm("scancel", number)
    case.slurm.until_said(log, "stopped on request after step|Exited with exit code 70", 100)
    assert "stopped on request after step" in log.read_text(), log.read_text()[-4000:]
    job = case.slurm.until(number, {"PENDING", *ENDS}, 100)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
