"""What the tests of k8s/ share: overlays as kubectl renders them, and containers as Kubernetes would start them."""

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests.conftest import ROOT

K8S = ROOT / "k8s"
OVERLAYS = sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml"))
WHOLE = ("storage", "data-prep", *(f"overlays/{name}" for name in OVERLAYS))
"""What a user applies."""
OPTIONAL = ("rdma", "kueue", "s3-data", "topology", "priority")
"""Components that a user adds to an overlay."""
RUN_LABELS = {"app.kubernetes.io/name": "chispike", "app.kubernetes.io/component": "train"}


def render(folder: str) -> list[dict]:
    """The objects of a kustomization below k8s/."""
    return _render(os.fspath(K8S / folder))


@functools.cache
def _render(folder: str) -> list[dict]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: nothing renders k8s/")
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def with_components(overlay: str, components: tuple[str, ...]) -> list[dict]:
    """An overlay as a user would extend it: a kustomization of their own that names it and the components."""
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".k8s-") as folder:
        document = {
            "resources": [f"../k8s/overlays/{overlay}"],
            "components": [f"../k8s/components/{name}" for name in components],
        }
        Path(folder, "kustomization.yaml").write_text(yaml.safe_dump(document))
        return _render(folder)


def one(documents: list[dict], kind: str, name: str = "chispike") -> dict:
    (found,) = [d for d in documents if d["kind"] == kind and d["metadata"]["name"] == name]
    return found


class Workload(NamedTuple):
    """A Job, wherever it stands."""

    job: str
    """The name that Kubernetes gives to the (first) Job."""
    spec: dict
    """Its JobSpec."""
    documents: list[dict]
    """What it is applied with."""

    @property
    def pod(self) -> dict:
        return self.spec["template"]["spec"]

    @property
    def containers(self) -> list[dict]:
        return self.pod.get("initContainers", []) + self.pod["containers"]


def workloads(documents: list[dict]) -> Iterator[Workload]:
    """Every Job, and the Jobs in a JobSet or a TrainingRuntime."""
    for document in documents:
        kind, name = document["kind"], document["metadata"]["name"]
        if kind == "Job":
            yield Workload(name, document["spec"], documents)
        if kind in ("JobSet", "TrainingRuntime"):
            spec = document["spec"] if kind == "JobSet" else document["spec"]["template"]["spec"]
            for job in spec["replicatedJobs"]:
                yield Workload(f"{name}-{job['name']}-0", job["template"]["spec"], documents)


def environment(workload: Workload, container: dict, index: int, secrets: dict[str, dict]) -> dict[str, str]:
    """What the container of pod `index` finds in its environment, from ConfigMaps, `secrets` and its own list."""
    variables = {"JOB_COMPLETION_INDEX": str(index)}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            variables |= one(workload.documents, "ConfigMap", source["configMapRef"]["name"])["data"]
        else:
            variables |= secrets[source["secretRef"]["name"]]
    for entry in container.get("env", []):
        if "value" in entry:
            variables[entry["name"]] = expand(entry["value"], variables)
        else:
            assert entry["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['batch.kubernetes.io/job-name']"
            variables[entry["name"]] = workload.job
    assert all(isinstance(value, str) for value in variables.values()), variables
    return variables


def expand(text: str, variables: dict[str, str]) -> str:
    """$(NAME) as Kubernetes replaces it. An unknown name is an error here; Kubernetes leaves it as it is."""
    return re.sub(r"\$\((\w+)\)", lambda name: variables[name[1]], text)


def argv(container: dict, variables: dict[str, str], tmp_path: Path) -> list[str]:
    """The container's command line after its own shell has split it: the program's words, without `python`."""
    shim = tmp_path / "python"
    shim.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    shim.chmod(0o755)
    command = [expand(word, variables) for word in (*container["command"], *container.get("args", ()))]
    environ = {**variables, "PATH": f"{tmp_path}:/usr/bin:/bin"}
    path = shutil.which(command[0], path=environ["PATH"])
    assert path, command
    done = subprocess.run([path, *command[1:]], env=environ, stdout=subprocess.PIPE, check=True, cwd="/")
    return done.stdout.decode().split("\0")[:-1]


def run_python(words: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs `python WORDS…` as in the image: from the program's folder, with no other environment."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def training_port(workload: Workload) -> int:
    (port,) = [port for port in workload.pod["containers"][0]["ports"] if port["name"] == "metrics"]
    return port["containerPort"]
