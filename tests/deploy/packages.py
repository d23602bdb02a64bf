"""The Debian packages of the tests in this folder: which are missing, and by wish their installation.

A test whose tools are not there is skipped with the command that installs them. `DEPLOY_INSTALL=1`, as root, lets the
test install them itself.
"""

import os
import shutil
import subprocess

import pytest

TOOLS = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "munged": "munge",
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
    "pdsh": "pdsh",
    "systemd-analyze": "systemd",
    "systemd-nspawn": "systemd-container",
    "dbus-daemon": "dbus",
    "podman": "podman",
    "buildah": "buildah",
    "crun": "crun",
    "catatonit": "catatonit",
    "debootstrap": "debootstrap",
    "prometheus": "prometheus",
    "prometheus-alertmanager": "prometheus-alertmanager",
    "glusterd": "glusterfs-server",
    "gluster": "glusterfs-server",
    "glusterfs": "glusterfs-client",
    "glusterfsd": "glusterfs-client",
    "ip": "iproute2",
    "unshare": "util-linux",
}
"""The package that each tool is in."""
FOLDERS = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"
"""Where tools lie: daemons stand in folders that a user's PATH may lack."""
used: set[str] = set()
"""Packages that a test has asked for and found; their versions go into the log."""


def tool(name: str) -> str | None:
    """The path of a tool, or None."""
    return shutil.which(name, path=FOLDERS)


def need(*tools: str, root: bool = True) -> None:
    """Skips the test where it is not root or `tools` are missing and may not be installed; fails where apt-get does.

    Without `root` only the installation needs it.
    """
    am_root = os.geteuid() == 0
    if root and not am_root:
        pytest.skip("needs root")
    packages = sorted({TOOLS[name] for name in tools if tool(name) is None})
    if packages and not (am_root and os.environ.get("DEPLOY_INSTALL") == "1"):
        pytest.skip(f"needs apt-get install {' '.join(packages)}; as root, DEPLOY_INSTALL=1 lets the test do so")
    if packages:
        _install(packages)
    used.update(TOOLS[name] for name in tools)


def _install(packages: list[str]) -> None:
    # RUNLEVEL=1: the packages' own services are not started on this machine.
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for words in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        command = ["apt-get", "--quiet", "--option", "DPkg::Lock::Timeout=300", *words]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{(done.stdout + done.stderr)[-3000:]}"


def versions() -> str:
    """The packages that tests have used, with their versions."""
    command = ["dpkg-query", "--show", "--showformat", "${Package} ${Version}\n", *sorted(used)]
    return ", ".join(subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")[:-1])
