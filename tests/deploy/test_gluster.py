"""A run folder on GlusterFS: a server on node-0, mounted by each of two nodes over their network."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import EXIT_DONE, ConfigError
from pipeline.run_dir import locks
from tests.deploy.packages import need, tool
from tests.support.namespaces import APART, Nodes, two_nodes, unavailable

pytestmark = pytest.mark.deploy
FROZEN_S = 30
"""Less than the 42 s after which GlusterFS' clients give a silent server up (network.ping-timeout)."""
_SERVER = """
for folder in /var/lib/glusterd /var/log/glusterfs /run/gluster; do
    mkdir -p $folder; mount -t tmpfs state $folder
done
mkdir -p /var/lib/glusterd/groups
{glusterd} --no-daemon --pid-file=/run/gluster/glusterd.pid & wait
"""


class Server:
    """glusterd with one volume, `runs`, of one brick; `folders` are its mounts on node-0 and node-1."""

    def __init__(self, nodes: Nodes, folder: Path) -> None:
        self._nodes, self._folder = nodes, folder
        self._daemon: subprocess.Popen[bytes] | None = None
        self.folders = [folder / f"mount-{node}" for node in (0, 1)]

    def start(self) -> None:
        brick = self._folder / "brick"
        brick.mkdir()
        script = "hostname node-0" + _SERVER.format(glusterd=tool("glusterd"))
        log = (self._folder / "glusterd.log").open("wb")
        command = ["ip", "netns", "exec", self._nodes.names[0], *APART, "sh", "-c", script]
        self._daemon = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + 60
        while self.gluster("pool", "list", check=False).returncode:
            assert time.monotonic() < end, (self._folder / "glusterd.log").read_text()
            time.sleep(0.5)
        self.gluster("volume", "create", "runs", f"10.77.0.1:{brick}", "force")
        self.gluster("volume", "start", "runs")
        for node, mounted in enumerate(self.folders):
            mounted.mkdir()
            # Only the network is the node's: the mount is seen by this process too.
            client = ["nsenter", f"--net=/run/netns/{self._nodes.names[node]}", tool("glusterfs") or ""]
            where = ["--volfile-server=10.77.0.1", "--volfile-id=runs", f"--log-file={mounted}.log", str(mounted)]
            subprocess.run([*client, *where], check=True, timeout=60)
            assert mounted.is_mount(), Path(f"{mounted}.log").read_text()[-3000:]

    def gluster(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """An administrator's command on the server."""
        whole = ["nsenter", "--target", str(self._first()), "--all", tool("gluster") or "", "--mode=script", *words]
        return subprocess.run(whole, capture_output=True, text=True, timeout=120, check=check)

    def _first(self) -> int:
        """PID 1 of the server's namespaces, as this machine sees it."""
        assert self._daemon
        end = time.monotonic() + 20
        while time.monotonic() < end:
            children = Path(f"/proc/{self._daemon.pid}/task/{self._daemon.pid}/children").read_text().split()
            if children:
                return int(children[0])
            time.sleep(0.1)
        raise AssertionError((self._folder / "glusterd.log").read_text())

    def brick(self) -> int:
        """The process that serves the volume, as this machine sees it."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if words[0] == tool("glusterfsd") and f"{self._folder}/brick" in words:
                return int(path.parent.name)
        raise AssertionError("no brick runs")

    def close(self) -> None:
        for mounted in self.folders:
            subprocess.run(["umount", "--lazy", str(mounted)], check=False)
        if self._daemon:
            os.killpg(self._daemon.pid, signal.SIGKILL)
            self._daemon.wait(timeout=30)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    need("glusterd", "gluster", "glusterfs")
    if reason := unavailable():
        pytest.skip(f"no network namespaces here: {reason}")
    with two_nodes() as made:
        yield made


@pytest.fixture(scope="module")
def server(nodes, tmp_path_factory) -> Iterator[Server]:
    made = Server(nodes, tmp_path_factory.mktemp("gluster"))
    try:
        made.start()
        yield made
    finally:
        made.close()


def test_a_lock_of_one_node_keeps_the_other_out(server):
    for folder in server.folders:
        (folder / "locked").mkdir(exist_ok=True)
    with locks.hold(str(server.folders[0] / "locked")), pytest.raises(ConfigError, match="is in use by process"):
        locks.hold(str(server.folders[1] / "locked"), patience_s=0)
    locks.hold(str(server.folders[1] / "locked"), patience_s=0).close()


@pytest.mark.parametrize("what", ["frozen", "killed"])
def test_a_run_goes_on_when_its_file_server_was(server, nodes, digits, what):
    small = "--data.image_size 8 --train.log_every 1 --train.checkpoint_every 10 --train.epochs 20"
    train = ["--recipe", "digits", "--data.path", str(digits), *small.split(), "--run_dir"]
    jobs = [nodes.start(node, train=[*train, str(server.folders[node] / what)]) for node in (0, 1)]
    jobs[0].until(r"^step +25/")
    os.kill(server.brick(), signal.SIGSTOP if what == "frozen" else signal.SIGKILL)
    time.sleep(FROZEN_S if what == "frozen" else 10)
    if what == "frozen":
        os.kill(server.brick(), signal.SIGCONT)
    else:
        server.gluster("volume", "start", "runs", "force")
    assert [job.ended(400) for job in jobs] == [EXIT_DONE] * 2, "\n\n".join(job.output for job in jobs)
    assert not re.search("Traceback", jobs[0].output + jobs[1].output)
    assert what == "killed" or "restart" not in jobs[0].output
    assert (server.folders[1] / what / "summary.json").exists()
