"""DeepSpeed's own launcher over a real ssh: two network namespaces, an sshd in each, pdsh between them."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.run_dir import locks
from tests.conftest import ROOT
from tests.deploy.packages import need, tool
from tests.support.namespaces import Job, cores, two_nodes, unavailable
from tests.support.supervised import NEUTRAL

pytestmark = pytest.mark.deploy
_SSHD = """\
ListenAddress 0.0.0.0
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile {folder}/sshd-{node}.pid
PermitRootLogin yes
PubkeyAuthentication yes
PasswordAuthentication no
StrictModes no
UsePAM no
"""
_SSH = """\
Host *
IdentityFile {folder}/user
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


class Hosts:
    """node-0 and node-1 with a daemon each; `deepspeed` is started on node-0."""

    def __init__(self, nodes, folder: Path) -> None:
        self._nodes, self.folder = nodes, folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._started: list[subprocess.Popen[str]] = []
        self.hostfile = folder / "hostfile"
        self.hostfile.write_text("node-0 slots=1\nnode-1 slots=1\n")

    def start(self) -> None:
        for name in ("host", "user"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)], check=True, timeout=30
            )
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's own empty folder; the service makes it elsewhere
        for node, name in enumerate(self._nodes.names):
            # `ip netns exec` lays these over the files of /etc.
            client = Path("/etc/netns") / name / "ssh"
            client.mkdir()
            (client / "ssh_config").write_text(_SSH.format(folder=self.folder))
            settings = self.folder / f"sshd-{node}.conf"
            settings.write_text(_SSHD.format(folder=self.folder, node=node))
            log = (self.folder / f"sshd-{node}.log").open("wb")
            # The shell is PID 1: what ssh has started ends with it.
            apart = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
            daemon = f"{tool('sshd')} -D -e -f {settings} & wait"
            command = ["ip", "netns", "exec", name, *node_of(node), *apart, "sh", "-c", daemon]
            self._daemons.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
        for node in (0, 1):
            reached = f"until ssh node-{node} true 2>/dev/null; do sleep 0.2; done"
            subprocess.run(
                ["ip", "netns", "exec", self._nodes.names[0], "timeout", "20", "sh", "-c", reached], check=True
            )

    def deepspeed(self, *words: str, options: tuple[str, ...] = ()) -> Job:
        """`deepspeed` on node-0, in a process group of its own as in a terminal."""
        exported = {
            "PYTHONPATH": str(ROOT),
            "DS_ACCELERATOR": "cpu",
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
        }
        # DeepSpeed takes over to the other nodes what stands in this file of the home folder or of the working folder.
        (self.folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in exported.items()))
        command = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(self.hostfile), *options]
        environ = {**NEUTRAL, **exported, "PDSH_RCMD_TYPE": "ssh"}
        process = subprocess.Popen(
            ["ip", "netns", "exec", self._nodes.names[0], *node_of(0), *command, str(ROOT / "launch/train.py"), *words],
            cwd=self.folder, env=environ, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self._started.append(process)
        return Job(process)

    def close(self) -> None:
        for daemon in (*self._started, *self._daemons):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait(timeout=30)


def node_of(node: int) -> list[str]:
    """What comes before a command of a node: half of the cores, and a host name."""
    named = f'hostname node-{node}; exec "$@"'
    return ["taskset", "--cpu-list", cores(node), "unshare", "--uts", "sh", "-c", named, "sh"]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    need("sshd", "ssh-keygen", "pdsh")
    if reason := unavailable():
        pytest.skip(f"no network namespaces here: {reason}")
    with two_nodes() as nodes:
        made = Hosts(nodes, tmp_path_factory.mktemp("ssh"))
        try:
            made.start()
            yield made
        finally:
            made.close()


@pytest.fixture
def words(digits, tmp_path) -> list[str]:
    """Two epochs of the digits."""
    small = "--data.image_size 8 --train.log_every 1 --metrics.port 0"
    return ["--recipe", "digits", "--data.path", str(digits), "--run_dir", str(tmp_path / "run"), *small.split()]


def test_two_epochs_on_two_nodes(hosts, words, tmp_path):
    job = hosts.deepspeed(*words, "--train.epochs", "2")
    assert job.ended(200) == 0, job.output
    assert "digits: 2 ranks on cpu" in job.output
    assert (tmp_path / "run/summary.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_deepspeed_saves_a_checkpoint(hosts, words, tmp_path, number):
    """Ctrl-C reaches the terminal's whole process group, SIGTERM the command alone."""
    job = hosts.deepspeed(*words, "--train.epochs", "100")
    job.until(r"step +5/")
    if number == signal.SIGINT:
        os.killpg(job.process.pid, number)
    else:
        os.kill(job.process.pid, number)
    job.ended(120)
    locks.hold(str(tmp_path / "run"), 120).close()  # the ranks save and leave after the launcher
    assert (tmp_path / "run/checkpoints/latest").exists(), job.output  # the first of its own would be at step 50


def test_one_node_of_the_hostfile(hosts, words):
    job = hosts.deepspeed(*words, "--train.epochs", "1", options=("--include", "node-1", "--force_multi"))
    assert job.ended(120) == 0, job.output
    assert "digits: 1 ranks on cpu" in job.output
    assert "node-1: step" in job.output
    assert "node-0: " not in job.output


def test_one_other_node_alone_without_force_multi_is_refused(hosts, words):
    """DeepSpeed then starts the ranks here and not there."""
    job = hosts.deepspeed(*words, "--train.epochs", "1", options=("--include", "node-1"))
    job.ended(120)
    assert "add --force_multi" in job.output
    assert "step " not in job.output
