"""The job script of docs/clusters.md in a real Slurm of two nodes, with both ways in which Slurm tracks processes."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.deploy import slurm as daemons
from tests.deploy.packages import need
from tests.deploy.slurm import Slurm, cluster
from tests.launch.test_ways_to_start import block
from tests.support.namespaces import cores, two_nodes, unavailable
from tests.support.supervised import NEUTRAL

pytestmark = pytest.mark.deploy
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
        small = "--data.image_size 8 --train.log_every 5 --train.eval_every_epochs 5000"
        self._options = f"digits --data.path {digits} --run_dir {self.run_dir} {small}"

    def submit(self, *options: str, epochs: int) -> str:
        script = block("sh", "#SBATCH").replace("imagenet_sew34_chi", f"{self._options} --train.epochs {epochs}")
        script = script.replace(" python ", f" {sys.executable} ").replace("supervise ", "supervise --slots 1 ")
        variables = {**NEUTRAL, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "eth0"}
        variables["OMP_NUM_THREADS"] = str(len(cores(0).split(",")))
        here = ["--nodes", "2", "--gpus-per-node", "0", "--cpus-per-task", "1", *options]
        return self.slurm.submit(script, *here, cwd=self.folder, variables=variables)

    def log(self, number: str) -> Path:
        return self.folder / f"slurm-{number}.out"


@pytest.fixture
def case(slurm, digits, tmp_path) -> Case:
    return Case(slurm, digits, tmp_path)


def test_a_job_that_has_trained_is_completed(case):
    number = case.submit("--time", "20", epochs=2)
    job = case.slurm.until(number, ENDS, 200)
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("COMPLETED", "0", "0:0"), case.log(
        number
    ).read_text()
    assert (case.run_dir / "summary.json").exists()


def test_a_job_at_its_time_limit_saves_and_is_queued_again_and_scancel_saves_and_ends_it(case):
    """The warning comes before the limit, as `--signal` asks; the lines of the first start stay in the log."""
    number = case.submit("--time", "3", "--signal", "USR1@90", epochs=5000)
    slurm, log = case.slurm, case.log(number)
    trains = slurm.until_said(log, r"step +\d+/", 120)
    warned = slurm.until_said(log, "SIGUSR1 received: the ranks save and stop", 200, past=trains)
    saved = slurm.until_said(log, "stopped on request after step", 60, past=warned)
    assert slurm.until(number, {"PENDING", *ENDS}, 60)["JobState"] == "PENDING"
    slurm("scontrol", "update", f"JobId={number}", "TimeLimit=60")
    resumed = slurm.until_said(log, "resumed from the checkpoint after step", 120, past=saved)
    trains = slurm.until_said(log, r"step +\d+/", 60, past=resumed)
    slurm("scancel", number)
    slurm.until_said(log, "stopped on request after step", 100, past=trains)
    job = slurm.until(number, ENDS, 100)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "1")
