"""Builds the Dockerfile without a container engine: in a chroot with this machine's /usr and Python.

What differs from a real build: the base image is this machine, so the steps that only prepare Debian are not run
(`NOT_RUN`); there are no layers, no labels and no image size. Needs root, for mounts.
"""

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from string import Template
from typing import NamedTuple

from tests.conftest import ROOT

NOT_RUN = ("apt-get update", "useradd")
"""Beginnings of RUN steps that would change the machine that is borrowed."""
_MOUNTS = """
set -e
mount --make-rprivate /
mount --bind {root} {root}
for folder in bin sbin lib lib64; do ln -sfn usr/$folder {root}/$folder; done
mkdir -p {root}/usr {root}/etc {root}/dev {root}/proc {root}/opt {root}/tmp
mount --bind /usr {root}/usr
mount --bind /etc {root}/etc
mount --bind /dev {root}/dev
mount -t proc proc {root}/proc
for folder in {python}/ /opt/*/; do mkdir -p {root}$folder; mount --bind $folder {root}$folder; done
for folder in /usr /etc {python}; do mount -o remount,bind,ro {root}$folder; done
"""


class Step(NamedTuple):
    instruction: str
    rest: str


def steps(text: str) -> list[Step]:
    """The instructions of a Dockerfile, continuation lines joined, comments dropped."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Step(*line.split(maxsplit=1)) for line in whole.splitlines() if line.strip()]


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore excludes a path (from the context's root): the last pattern that matches decides."""
    out = False
    for pattern in patterns:
        plain = pattern.removeprefix("!")
        folders = ["/".join(path.split("/")[:n]) for n in range(1, path.count("/") + 2)]
        forms = (plain, plain.removeprefix("**/")) if plain.startswith("**/") else (plain,)
        if any(fnmatch.fnmatch(folder, form) for folder in folders for form in forms):
            out = not pattern.startswith("!")
    return out


class Image:
    """The file system that a Dockerfile makes, in `root`. `not_run` lists the steps that were passed over."""

    def __init__(self, root: Path) -> None:
        self.root, self.not_run = root, []
        self.environ: dict[str, str] = {
            "PATH": f"{sys.base_prefix}/bin:/usr/local/bin:/usr/sbin:/usr/bin",
            "HOME": "/tmp",
        }
        self.user, self.workdir, self.entrypoint = "0:0", "/", []
        self._arguments: dict[str, str] = {}
        text = (ROOT / ".dockerignore").read_text()
        self._ignore = [line for line in text.splitlines() if line and not line.startswith("#")]

    def build(self) -> None:
        for step in steps((ROOT / "Dockerfile").read_text()):
            getattr(self, f"_{step.instruction.lower()}")(step.rest)

    def run(
        self, command: list[str], environ: dict[str, str], *, volumes: dict[str, Path], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """A container: PID 1 in a network of its own, the image's user without any capability, the root read-only.

        Args:
            volumes: by mount path, a folder of the host; /dev/shm gets memory of its own.
        """
        script = _MOUNTS.format(root=self.root, python=sys.base_prefix)
        for target, source in volumes.items():
            script += f"mkdir -p {self.root}{target}; mount --bind {source} {self.root}{target}\n"
        script += f"mount -t tmpfs tmpfs {self.root}/dev/shm; chmod 1777 {self.root}/dev/shm\n"
        script += f"ip link set lo up; mount -o remount,bind,ro {self.root}\n"
        uid, gid = self.user.split(":")
        limits = f"--reuid {uid} --regid {gid} --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all"
        inside = f"cd {self.workdir} && exec setpriv {limits} {shlex.join(command)}"
        script += f"exec chroot {self.root} /bin/sh -ec {shlex.quote(inside)}\n"
        return self._unshare(script, {**self.environ, **environ}, "--net", timeout=timeout)

    def _unshare(
        self, script: str, environ: dict[str, str], *more: str, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        command = ["unshare", "--mount", "--pid", "--ipc", "--fork", "--kill-child", *more, "/bin/sh", "-c", script]
        return subprocess.run(
            command,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )

    def _run(self, command: str) -> None:
        if command.startswith(NOT_RUN):
            self.not_run.append(command)
            return
        script = _MOUNTS.format(root=self.root, python=sys.base_prefix)
        script += f"cd /; exec chroot {self.root} /bin/sh -ec {shlex.quote(f'cd {self.workdir}; {command}')}\n"
        host = {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k.lower().endswith("_proxy")}
        done = self._unshare(script, {**host, **self.environ, **self._arguments}, timeout=900)
        assert done.returncode == 0, f"RUN {command}\n{done.stdout[-4000:]}"

    def _copy(self, rest: str) -> None:
        *sources, target = rest.split()
        place = self.root / self.workdir.lstrip("/") / target
        for source in sources:
            assert not ignored(source, self._ignore), f".dockerignore keeps {source} out"
            if (ROOT / source).is_file():
                shutil.copy(ROOT / source, place)
                continue

            def skip(folder: str, names: list[str]) -> set[str]:
                inside = Path(folder).relative_to(ROOT).as_posix()
                return {name for name in names if ignored(f"{inside}/{name}", self._ignore)}

            shutil.copytree(ROOT / source, place, ignore=skip)

    def _from(self, _: str) -> None:
        assert not self.entrypoint, "a second stage is not known here"

    def _env(self, rest: str) -> None:
        for word in shlex.split(rest):
            name, _, value = word.partition("=")
            self.environ[name] = Template(value).substitute(self._arguments | self.environ)

    def _arg(self, rest: str) -> None:
        name, _, default = rest.partition("=")
        self._arguments[name] = default

    def _workdir(self, rest: str) -> None:
        self.workdir = rest
        (self.root / rest.lstrip("/")).mkdir(parents=True)

    def _user(self, rest: str) -> None:
        self.user = rest

    def _entrypoint(self, rest: str) -> None:
        self.entrypoint = [word.strip(' "') for word in rest.strip("[]").split(",")]

    def _cmd(self, _: str) -> None: ...

    def _expose(self, rest: str) -> None:
        self.port = int(rest)
