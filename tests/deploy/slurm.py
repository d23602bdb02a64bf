"""A Slurm cluster of two nodes on one machine: slurmctld and two slurmd, in the namespaces of support/namespaces.py."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.deploy.packages import tool
from tests.support.namespaces import APART, Nodes, cores

_CONF = """\
ClusterName=chispike
SlurmctldHost=node-0(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2
ReturnToService=2
MpiDefault=none
KillWait=100
NodeName=node-0 NodeAddr=10.77.0.1 CPUs={cpus}
NodeName=node-1 NodeAddr=10.77.0.2 CPUs={cpus}
PartitionName=all Nodes=node-0,node-1 Default=YES MaxTime=INFINITE State=UP
"""
_CGROUP = "CgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\nCgroupPlugin=cgroup/v1\n"
# The shell is PID 1 of the node and reaps what the daemons leave. Each node has a tree of control groups to itself.
_MOUNT = """
mount -t tmpfs cgroup /sys/fs/cgroup && mkdir /sys/fs/cgroup/freezer
mount -t cgroup -o freezer cgroup /sys/fs/cgroup/freezer
"""
_NODE = """
hostname {name}
mkdir -p /sys/fs/cgroup/freezer/{group}
echo 0 > /sys/fs/cgroup/freezer/{group}/cgroup.procs
umount /sys/fs/cgroup/freezer
exec unshare --cgroup sh -c 'mount -t cgroup -o freezer cgroup /sys/fs/cgroup/freezer; {daemons} wait'
"""


def unavailable() -> str:
    """Why Slurm's daemons cannot start here, or nothing. slurmd wants control groups with either proctrack."""
    mounted = subprocess.run(["unshare", "--mount", "sh", "-ec", _MOUNT], capture_output=True, text=True, check=False)
    return mounted.stderr.strip()


class Slurm:
    """A running cluster. Nodes wait five seconds, not two minutes, before they start a requeued job (`cred_expire`)."""

    def __init__(self, nodes: Nodes, folder: Path, proctrack: str) -> None:
        self._nodes, self._folder, self._proctrack = nodes, folder, proctrack
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Returns when both nodes can take a job."""
        folder, conf = self._folder, self._folder / "slurm.conf"
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        conf.write_text(_CONF.format(folder=folder, proctrack=self._proctrack, cpus=os.cpu_count()))
        (folder / "cgroup.conf").write_text(_CGROUP)
        munge = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        words = [f"--{option}={folder}/munge.{name}" for option, name in munge.items()]
        self._start(0, [tool("munged") or "", "--foreground", "--force", *words])
        _until(lambda: (folder / "munge.socket").exists(), 20, "munged does not answer")
        for node, name in enumerate(self._nodes.names):
            (folder / f"node-{node}").mkdir()
            daemons = f"taskset --cpu-list {cores(node)} {tool('slurmd')} -D -f {conf} &"
            if node == 0:
                daemons = f"{tool('slurmctld')} -D -f {conf} & {daemons}"
            script = _MOUNT + _NODE.format(name=f"node-{node}", group=name, daemons=daemons)
            self._start(node, [*APART, "sh", "-c", script])
        _until(self._idle, 60, "the nodes do not come up")

    def _start(self, node: int, command: list[str]) -> None:
        log = (self._folder / f"daemons-{node}.log").open("ab")
        whole = ["ip", "netns", "exec", self._nodes.names[node], *command]
        self._daemons.append(subprocess.Popen(whole, stdout=log, stderr=log, start_new_session=True))

    def _idle(self) -> bool:
        with contextlib.suppress(subprocess.CalledProcessError):
            return self("sinfo", "--noheader", "--format", "%D %t") == "2 idle\n"
        return False

    def __call__(self, *command: str, **variables: str) -> str:
        """What a command of Slurm prints, run on node 0.

        Raises:
            subprocess.CalledProcessError: it fails.
        """
        environ = {**os.environ, "SLURM_CONF": str(self._folder / "slurm.conf"), **variables}
        whole = ["ip", "netns", "exec", self._nodes.names[0], *command]
        done = subprocess.run(whole, env=environ, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
        return done.stdout

    def submit(self, script: str, *options: str, cwd: Path, variables: Mapping[str, str]) -> str:
        """The number of the job that runs `script`."""
        path = cwd / "job.sh"
        path.write_text(script)
        return self("sbatch", "--parsable", "--chdir", str(cwd), *options, str(path), **variables).strip()

    def job(self, number: str) -> dict[str, str]:
        """A job's fields as scontrol shows them, such as JobState, Restarts and ExitCode."""
        shown = self("scontrol", "--oneliner", "show", "job", number)
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def until(self, number: str, states: set[str], seconds: float) -> dict[str, str]:
        """The job's fields as soon as it is in one of `states`."""
        _until(lambda: self.job(number)["JobState"] in states, seconds, f"job {number} is in none of {states}")
        return self.job(number)

    def until_said(self, log: Path, pattern: str, seconds: float, past: int = 0) -> int:
        """Waits until `pattern` stands in a job's log behind the place `past`; the place where it ends."""
        end = time.monotonic() + seconds
        while True:
            text = log.read_text() if log.exists() else ""
            if match := re.compile(pattern).search(text, past):
                return match.end()
            assert time.monotonic() < end, (
                f"no {pattern!r} within {seconds} s behind:\n{text[:past][-200:]}\nbut:\n{text[past:][-4000:]}"
            )
            time.sleep(0.5)

    def close(self) -> None:
        for daemon in self._daemons:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait(timeout=30)
        groups = " ".join(f"/sys/fs/cgroup/freezer/{name}" for name in self._nodes.names)
        remove = f"{_MOUNT} find {groups} -depth -type d -exec rmdir {{}} +"
        subprocess.run(["unshare", "--mount", "sh", "-c", remove], check=False, timeout=30)

    def said(self) -> str:
        """The ends of all logs."""
        logs = sorted(self._folder.glob("*.log"))
        return "\n".join(f"{log.name}:\n{log.read_text(errors='replace')[-2000:]}" for log in logs)


def _until(there, seconds: float, otherwise: str) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, f"{otherwise} within {seconds} s"
        time.sleep(0.5)


@contextlib.contextmanager
def cluster(nodes: Nodes, folder: Path, proctrack: str) -> Iterator[Slurm]:
    folder.mkdir()
    made = Slurm(nodes, folder, proctrack)
    try:
        made.start()
        yield made
    except BaseException:
        print(made.said())
        raise
    finally:
        made.close()
