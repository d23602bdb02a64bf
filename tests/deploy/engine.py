"""podman with a storage of its own, and the image that it builds from the Dockerfile as it stands."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from pipeline import __version__
from tests.conftest import ROOT
from tests.support.namespaces import cores

IMAGE = f"chispike:{__version__}-cpu"
"""The name that the overlay cpu-smoke has for it."""
_HOSTS = """\
127.0.0.1 localhost
10.77.0.1 node-0 chispike-0 chispike-0.chispike
10.77.0.2 node-1 chispike-1 chispike-1.chispike
"""
CPU_TORCH = "https://download.pytorch.org/whl/cpu"
_CONTEXT = ("Dockerfile", ".dockerignore", "constraints.txt", "pyproject.toml", "pipeline", "data_prep", "launch")
_PIP = ("cert", "extra-index-url", "find-links", "index-url", "trusted-host")
"""Settings of this machine's pip that a build uses too: where packages come from."""
HYBRID = Path("/sys/fs/cgroup/unified")
"""crun does not start where cgroup2 is mounted beside version 1 and holds a controller; it is hidden from it."""


class Engine:
    """podman as root. Its mounts are made in a mount namespace of its own, which `close` ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "hosts").write_text(_HOSTS)
        # A pod's own container asks for more open files than root may have where the limit is below the kernel's.
        limits = 'default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]'
        (folder / "containers.conf").write_text(f'[containers]\nbase_hosts_file = "{folder}/hosts"\n{limits}\n')
        hide = f"umount {HYBRID}; " if HYBRID.is_dir() else ""
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "slave", "sh", "-c", f"{hide}echo ready; exec sleep infinity"],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._holder.stdout
        assert self._holder.stdout.readline() == "ready\n"

    def __call__(self, *words: str, check: bool = True, timeout: float = 120, network: str = "") -> str:
        """What a podman command prints, errors too. `network` is the namespace that is the host's network to it."""
        storage = ["--root", str(self._folder / "storage"), "--runroot", str(self._folder / "run")]
        command = ["podman", *storage, "--runtime", "crun", "--cgroup-manager", "cgroupfs", *words]
        within = ["nsenter", "--target", str(self._holder.pid), "--mount"]
        within += [f"--net=/run/netns/{network}"] if network else []
        done = subprocess.run(
            [*within, *command], env={**os.environ, "CONTAINERS_CONF": str(self._folder / "containers.conf")},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=timeout, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-4000:]}"
        return done.stdout

    def build(self) -> None:
        """The CPU image, from a checkout that only root can read."""
        self._base(next(line for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("FROM ")))
        context = self._folder / "context"
        context.mkdir()
        for name in _CONTEXT:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, context / name)
        for path in (context, *context.rglob("*")):
            path.chmod(path.stat().st_mode & 0o700)
        index = CPU_TORCH if _reachable(CPU_TORCH) else ""  # else pip's own settings have to know a CPU build of torch
        words = ["--network", "host", "--pull=never", *self._pip(), "--build-arg", f"TORCH_INDEX={index}"]
        self("build", *words, "--build-arg", "COMMIT=deploy", "--tag", IMAGE, str(context), timeout=2400)

    def _base(self, line: str) -> None:
        """The image that FROM names: of its registry, else Debian with the same Python's line under that name."""
        name = line.split()[1]
        if "Error" not in self("pull", name, check=False):
            return
        root = self._folder / "base"
        packages = "ca-certificates,python3,python3-venv"
        command = ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(root)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stdout[-3000:]
        (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        archive = self._folder / "base.tar"
        subprocess.run(["tar", "-C", str(root), "-cf", str(archive), "."], check=True, timeout=300)
        self("import", str(archive), f"docker.io/library/{name}", timeout=300)
        archive.unlink()
        shutil.rmtree(root)

    def _pip(self) -> list[str]:
        """Options that give a build this machine's sources of packages."""
        listed = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
        ).stdout
        settings = dict(line.split("=", 1) for line in listed.splitlines() if "=" in line)
        settings = {name.rpartition(".")[2]: value.strip("'") for name, value in settings.items()}
        settings = {name: value for name, value in settings.items() if name in _PIP}
        conf = self._folder / "pip.conf"
        conf.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
        folders = set()
        for name, value in settings.items():
            paths = [Path(word.removeprefix("file://")) for word in value.split()]
            # The links of an index lead out of its folder.
            folders |= {path if name == "find-links" else path.parent for path in paths if path.is_absolute()}
        return [f"--volume={path}:{path}:ro" for path in sorted(folders)] + [f"--volume={conf}:/etc/pip.conf:ro"]

    def size_bytes(self) -> int:
        return json.loads(self("image", "inspect", IMAGE))[0]["Size"]

    def close(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self("rm", "--all", "--force", "--time", "0", check=False)
        self._holder.kill()
        self._holder.wait(timeout=30)
        shutil.rmtree(self._folder / "storage", ignore_errors=True)


def _reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/torch/", timeout=20):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def engine(folder: Path) -> Iterator[Engine]:
    made = Engine(folder)
    try:
        yield made
    finally:
        made.close()


class Container:
    """A node of a run, without privileges and on a read-only root, as its pod on Kubernetes would be."""

    def __init__(self, engine: Engine, node: int, network: str, volumes: dict[Path, str], words: list[str]) -> None:
        self._engine, self.name = engine, f"node-{node}"
        options = ["--network", f"ns:/run/netns/{network}", "--hostname", self.name, "--cpuset-cpus", cores(node)]
        options += ["--shm-size", "512m", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
        options += [f"--volume={source}:{target}" for source, target in volumes.items()]
        options += ["--env", "DS_ACCELERATOR=cpu", "--env", "GLOO_SOCKET_IFNAME=eth0"]
        place = ["--nodes", "2", "--node-rank", str(node), "--master", "node-0", "--slots", "1"]
        engine("create", "--name", self.name, *options, IMAGE, *place, "--", *words)

    def start(self) -> None:
        self._engine("start", self.name)

    def stop(self) -> None:
        """As a drained node is stopped: SIGTERM, and 150 s later SIGKILL."""
        self._engine("stop", "--time", "150", self.name, timeout=200)

    def kill(self) -> None:
        """SIGKILL to all its processes: the kernel kills them with PID 1."""
        self._engine("kill", "--signal", "KILL", self.name)
        self._engine("wait", self.name)

    def ended(self) -> int:
        return int(self._engine("wait", self.name, timeout=400).split()[-1])

    @property
    def output(self) -> str:
        return self._engine("logs", self.name)

    def until(self, pattern: str, seconds: float = 240) -> None:
        """Returns when a line of it begins with `pattern`."""
        end = time.monotonic() + seconds
        while not re.search(f"^{pattern}", self.output, re.M):
            assert time.monotonic() < end, f"{self.name}: no {pattern!r} within {seconds} s\n{self.output[-4000:]}"
            time.sleep(0.5)
