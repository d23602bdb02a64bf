"""Two nodes on one machine: network namespaces joined by a cable, each node with processes and a name of its own.

Needs root, iproute2 and unshare; `unavailable()` says what is missing.
"""

import contextlib
import os
import queue
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.supervised import supervise

TOOLS = ("ip", "unshare", "hostname", "taskset")
APART = ("unshare", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")
"""Before a command: it is PID 1 of a node, and what it has started ends with it."""


def unavailable() -> str:
    """Why this machine cannot have namespaces, or nothing."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"{', '.join(missing)} cannot be found"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode == 0:
        subprocess.run(["ip", "netns", "del", name], check=False)
        made = subprocess.run([*APART, "true"], capture_output=True, text=True, check=False)
    return made.stderr.strip()


def needs(*tools: str) -> None:
    """Skips the test, saying why, where one of `tools` is not there."""
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} cannot be found")


class Job:
    """A supervisor that is PID 1 of a node, and what it has said, line by line with the time of each."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.said = process, []
        self._lines: queue.Queue[tuple[float, str] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._lines.put((time.monotonic(), line))
        self._lines.put(None)

    def until(self, pattern: str, seconds: float = 200) -> tuple[float, re.Match]:
        """The next line that matches, and when it came; fails with all that was said when none comes."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                said = self._lines.get(timeout=left)
                if said is None:
                    break
                self.said.append(said[1])
                if match := re.search(pattern, said[1]):
                    return said[0], match
        raise AssertionError(f"no {pattern!r} within {seconds} s:\n{''.join(self.said)}")

    def ended(self, seconds: float = 250) -> int:
        """The exit code; `output` is then complete."""
        end = time.monotonic() + seconds
        while (said := self._lines.get(timeout=max(0.1, end - time.monotonic()))) is not None:
            self.said.append(said[1])
        return self.process.wait(timeout=30)

    @property
    def output(self) -> str:
        return "".join(self.said)

    def inside(self, pattern: str) -> list[int]:
        """Process ids, as this machine sees them, of the node's processes whose command line matches."""
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and os.getsid(int(folder.name)) != 0:
                    same = os.readlink(folder / "ns" / "pid") == os.readlink(f"/proc/{self.first}/ns/pid")
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if same and re.search(pattern, line):
                        found.append(int(folder.name))
        return found

    @property
    def first(self) -> int:
        """PID 1 of the node, as this machine sees it."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return int(children.split()[0])

    def kill_node(self) -> None:
        """Every process of the node at once, as when its power goes."""
        os.kill(self.first, signal.SIGKILL)
        self.process.wait(timeout=30)


class Nodes:
    """node-0 and node-1, with 10.77.X.1 and .2 on a cable between them."""

    def __init__(self) -> None:
        self.names = [f"chispike-{os.getpid()}-{node}" for node in (0, 1)]
        self.jobs: list[Job] = []
        ends = [f"ck{os.getpid() % 100000}-{node}" for node in (0, 1)]
        for name in self.names:
            run("ip", "netns", "add", name)
            folder = Path("/etc/netns") / name
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 node-0\n10.77.0.2 node-1\n")
            run("ip", "-n", name, "link", "set", "lo", "up")
        run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for node, name in enumerate(self.names):
            run("ip", "link", "set", ends[node], "netns", name, "name", "eth0")
            run("ip", "-n", name, "addr", "add", f"10.77.0.{node + 1}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "eth0", "up")

    def start(self, node: int, *arguments: str, train: list[str], cwd: Path = ROOT, **variables: str) -> Job:
        """`python -m launch.supervise` as PID 1 of `node`; `arguments` win over what is usual here."""
        named = ["sh", "-c", f'hostname node-{node}; exec "$@"', "sh"]
        usual = ["--nodes", "2", "--node-rank", str(node), "--master", "node-0", "--slots", "1"]
        process = supervise(
            *usual,
            *arguments,
            "--",
            *train,
            prefix=("ip", "netns", "exec", self.names[node], "taskset", "--cpu-list", cores(node), *APART, *named),
            cwd=cwd,
            GLOO_SOCKET_IFNAME="eth0",
            **variables,
        )
        self.jobs.append(Job(process))
        return self.jobs[-1]

    def on(self, node: int, *command: str) -> None:
        """Runs a command with the network of `node`."""
        run("ip", "netns", "exec", self.names[node], *command)

    def close(self) -> None:
        for job in self.jobs:
            if job.process.poll() is None:
                os.killpg(job.process.pid, signal.SIGKILL)  # unshare's --kill-child takes the node with it
                job.process.wait(timeout=30)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def cores(node: int) -> str:
    """A node's half of this machine's cores, as taskset lists them; all of them where there is only one."""
    all_ = sorted(os.sched_getaffinity(0))
    half = len(all_) // 2  # as many threads as a rank has that shares the machine with another
    return ",".join(map(str, all_[node * half : (node + 1) * half] or all_))


def run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=30)


@contextlib.contextmanager
def two_nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    try:
        yield nodes
    finally:
        nodes.close()
