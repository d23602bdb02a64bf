"""Dockerfile and .dockerignore: parsed, and where mounts can be made, built and started in a chroot (image.py)."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.options import parse
from pipeline.run_dir import code_version, run_folder
from tests.conftest import ROOT
from tests.support.image import NOT_RUN, Image, ignored, steps
from tests.support.manifests import environment, render, training_port, workloads


def test_only_what_the_program_needs_goes_in():
    text = (ROOT / ".dockerignore").read_text()
    patterns = [line for line in text.splitlines() if line and not line.startswith("#")]
    copied = {
        word
        for step in steps((ROOT / "Dockerfile").read_text())
        if step.instruction == "COPY"
        for word in step.rest.split()[:-1]
    }
    top = {path.name for path in ROOT.iterdir() if not ignored(path.name, patterns)}
    assert top == copied
    assert not ignored("pipeline/snn/kernels/cpu.cpp", patterns)
    assert ignored("pipeline/__pycache__/train.cpython-311.pyc", patterns)


def test_the_image_pins_its_packages_and_ends_as_nobody():
    instructions = steps((ROOT / "Dockerfile").read_text())
    installs = [step.rest for step in instructions if step.instruction == "RUN" and "pip install" in step.rest]
    assert installs
    assert all("-c constraints.txt" in install for install in installs)
    last = {step.instruction: step.rest for step in instructions}
    (workload,) = workloads(render("overlays/cpu-smoke"))
    security = workload.pod["securityContext"]
    assert last["USER"] == f"{security['runAsUser']}:{security['runAsGroup']}"
    assert int(last["EXPOSE"]) == training_port(workload)
    code = [i for i, step in enumerate(instructions) if step.instruction == "COPY" and "pipeline" in step.rest]
    assert all(instructions.index(step) < code[0] for step in instructions if "pip install" in step.rest)


def test_the_images_user_can_read_what_a_checkout_under_any_umask_brings():
    instructions = steps((ROOT / "Dockerfile").read_text())
    kinds = [step.instruction for step in instructions]
    after = instructions[len(kinds) - kinds[::-1].index("COPY") : kinds.index("USER")]
    assert [step for step in after if step.instruction == "RUN" and "chmod -R a+rX . " in step.rest]


def test_a_run_knows_its_code_where_there_is_no_git(tmp_path, monkeypatch):
    variables = [step.rest for step in steps((ROOT / "Dockerfile").read_text()) if step.instruction == "ENV"]
    assert any("CHISPIKE_COMMIT=$COMMIT" in line for line in variables)
    config = parse(["--recipe", "digits", "--run_dir", str(tmp_path)])
    about = {"data_identity": "", "classes": (), "layers": (), "num_parameters": 1, "world_size": 1}
    monkeypatch.setenv("PATH", "")
    for said, commit in (("", f"unknown (source {code_version.version()})"), ("1a2b-dirty", "1a2b-dirty")):
        monkeypatch.setenv("CHISPIKE_COMMIT", said)
        run_folder.describe(config, **about)
        assert run_folder.read(tmp_path).about["commit"] == commit


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Iterator[Image]:
    probe = [
        "unshare",
        "--mount",
        "--pid",
        "--net",
        "--fork",
        "/bin/sh",
        "-c",
        "mount --make-rprivate / && ip link set lo up",
    ]
    if os.geteuid() or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("mounts cannot be made here, so there is no chroot: it takes root")
    if not (Path(sys.base_prefix) / "bin/python").exists() or sys.base_prefix == "/usr":
        pytest.skip(f"{sys.base_prefix} cannot be lent to the chroot as the image's Python")
    root = tmp_path_factory.mktemp("image") / "root"
    root.mkdir()
    root.parent.chmod(0o755)
    root.chmod(0o755)
    made = Image(root)
    made.build()
    yield made
    shutil.rmtree(root.parent)


@pytest.mark.faults
def test_the_smoke_overlay_runs_in_the_image(image, tmp_path):
    """The image's own commands run, packing and then training, as PID 1, without privileges, on a read-only root."""
    assert len(image.not_run) == len(NOT_RUN)  # the steps for Debian itself, and no other, were passed over
    (workload,) = workloads(render("overlays/cpu-smoke"))
    tmp_path.chmod(0o777)
    for container in workload.containers:
        variables = environment(workload, container, 0, {})
        variables |= {"CHISPIKE_NODES": "1", "SLOTS": "2"}
        if "OVERRIDES" in variables:
            variables["OVERRIDES"] += " --train.epochs 2"
        volumes = {}
        for mount in container["volumeMounts"]:
            if mount["mountPath"] != "/dev/shm":
                folder = tmp_path / mount["name"]
                folder.mkdir(exist_ok=True, mode=0o770)
                os.chown(folder, 10001, 10001)
                volumes[mount["mountPath"]] = folder
        command = [*container["command"], *container.get("args", ())]
        done = image.run(command, variables, volumes=volumes, timeout=400)
        assert done.returncode == 0, done.stdout[-4000:]
    assert (tmp_path / "runs/digits/summary.json").stat().st_uid == 10001
    assert "the CPU kernels could not be compiled" not in done.stdout


def test_the_package_carries_its_licence(tmp_path):
    """Its SPDX name and its text, in the metadata that an installer or a scanner reads."""
    (tmp_path / "pipeline").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "pipeline/__init__.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    build = "from setuptools import build_meta; print(build_meta.prepare_metadata_for_build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=True)
    folder = tmp_path / done.stdout.split()[-1]
    metadata = (folder / "METADATA").read_text(encoding="utf-8")
    assert "License-Expression: Apache-2.0\nLicense-File: LICENSE\n" in re.sub(r"(?m)^(?!License-).*\n", "", metadata)
    text = (folder / "licenses" / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License\n" in text
    assert "END OF TERMS AND CONDITIONS" in text
