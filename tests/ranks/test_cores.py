"""How many threads a rank takes: no more than it may use, whoever has limited it."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from pipeline.ranks import cores
from pipeline.ranks.cores import cores_per_rank, cpu_quota
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def _plain(monkeypatch) -> None:
    for name in ("OMP_NUM_THREADS", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("cpus", "quota", "environ", "threads"),
    [
        (8, None, {}, 8),
        (8, None, {"LOCAL_SIZE": "2"}, 4),
        (8, 0.5, {}, 1),
        (8, 2.5, {}, 2),
        (8, 6.0, {"LOCAL_SIZE": "2"}, 3),
        (8, 1.0, {"LOCAL_SIZE": "2"}, 1),
        (2, 16.0, {}, 2),
        (8, None, {"OMP_NUM_THREADS": "3", "LOCAL_SIZE": "2"}, 3),
        (8, None, {"OMP_NUM_THREADS": " 3,2 "}, 3),
        (8, 2.0, {"OMP_NUM_THREADS": "64"}, 2),
        (8, None, {"OMP_NUM_THREADS": "0"}, 8),
        (8, None, {"OMP_NUM_THREADS": "many"}, 8),
        (8, None, {"OMP_NUM_THREADS": ""}, 8),
        (8, None, {"OMP_NUM_THREADS": "-1"}, 8),
        (2, None, {"LOCAL_SIZE": "8"}, 1),
        (8, None, {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, 1),
        (8, None, {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}, 4),
    ],
)
def test_threads_of_a_rank(cpus, quota, environ, threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))  # other machines than this one
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert cores_per_rank() == threads


def process(folder: Path, cgroup: str, mounts: str, files: dict[str, str]) -> Path:
    """A folder of /proc, and the files of control groups below `folder`, which replaces MOUNT in `mounts`."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    proc = folder / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(cgroup)
    (proc / "mountinfo").write_text(f"22 1 0:1 / / rw - ext4 /dev/sda rw\n{mounts.replace('MOUNT', str(folder))}")
    return proc


V2 = "31 23 0:28 / MOUNT rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "32 31 0:29 {root} MOUNT rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "40 31 0:3 / /none rw - cgroup cgroup rw,memory\n"
)
DOCKER = "/docker/0123abcd"


@pytest.mark.parametrize(
    ("cgroup", "mounts", "files", "quota"),
    [
        ("0::/a/b\n", V2, {"a/b/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/a/b\n", V2, {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "400000 100000\n"}, 4.0),  # a pod's
        ("0::/a/b\n", V2, {"a/b/cpu.max": "800000 100000\n", "a/cpu.max": "400000 100000\n"}, 4.0),
        ("0::/a\n", V2, {"a/cpu.max": "max 100000\n"}, None),
        ("0::/a\n", V2, {"b/cpu.max": "50000 100000\n"}, None),  # of another group
        ("0::/\n", V2, {"cpu.max": "150000 100000\n"}, 1.5),  # a container with a namespace of its own
        ("0::/../other\n", V2, {"cpu.max": "150000 100000\n"}, 1.5),
        (
            "4:cpu,cpuacct:/a\n2:memory:/b\n0::/\n",
            V1.format(root="/"),
            {"a/cpu.cfs_quota_us": "200000\n", "a/cpu.cfs_period_us": "100000\n"},
            2.0,
        ),
        (
            f"4:cpu,cpuacct:{DOCKER}\n",
            V1.format(root=DOCKER),
            {"cpu.cfs_quota_us": "50000\n", "cpu.cfs_period_us": "100000\n"},
            0.5,
        ),
        ("4:cpu:/a\n", V1.format(root="/"), {"a/cpu.cfs_quota_us": "-1\n", "a/cpu.cfs_period_us": "100000\n"}, None),
        ("garbage\n\n0::\n", "garbage\n" + V2, {"cpu.max": "\n"}, None),
    ],
)
def test_the_quota_of_a_process_and_of_the_groups_above_it(cgroup, mounts, files, quota, tmp_path):
    assert cpu_quota(process(tmp_path, cgroup, mounts, files)) == quota


def test_a_process_without_control_groups_has_no_quota(tmp_path):
    assert cpu_quota(tmp_path) is None


def test_a_real_quota_is_kept_to():
    """In a control group of this machine, as `docker --cpus=1.5` makes one."""
    root = Path("/sys/fs/cgroup")
    first = (root / "cpu" / "cpu.cfs_quota_us").exists()
    group = (root / "cpu" if first else root) / f"chispike-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"a control group cannot be made here: {error.strerror}")
    try:
        try:
            if first:
                (group / "cpu.cfs_period_us").write_text("100000")
            (group / ("cpu.cfs_quota_us" if first else "cpu.max")).write_text("150000")
        except OSError as error:
            pytest.skip(f"a control group here has no quota of CPUs: {error.strerror}")
        code = (
            f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid())); "
            "from pipeline.ranks.cores import *; print(cpu_quota(), cores_per_rank())"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == "1.5 1\n"
    finally:
        with suppress(OSError):
            group.rmdir()


def test_the_two_pods_of_the_smoke_check_share_their_machine():
    run = yaml.safe_load((ROOT / "k8s/overlays/cpu-smoke/run.yaml").read_text())
    assert run["data"]["OMP_NUM_THREADS"] == "1"
