"""k8s/: what kubectl renders is valid, fits together, and starts our own programs. No cluster runs here."""

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api import models

from data_prep.__main__ import _parser as prep_parser
from launch import options, supervise
from launch.cluster.placement import resolve
from pipeline import __version__
from pipeline.errors import EXIT_DATA, EXIT_STOPPED, EXIT_USAGE
from tests.support.manifests import (
    K8S,
    OPTIONAL,
    RUN_LABELS,
    WHOLE,
    Workload,
    argv,
    environment,
    one,
    render,
    run_python,
    training_port,
    with_components,
    workloads,
)

VERSIONS = [f"1.{minor}" for minor in range(29, int(kubernetes_validate.latest_version().split(".")[1]) + 1)]
CUSTOM: dict[str, Callable] = {
    "JobSet": models.JobsetV1alpha2JobSet.from_dict,
    "TrainJob": models.TrainerV1alpha1TrainJob.from_dict,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime.from_dict,
}
UNPUBLISHED = {"LocalQueue", "PodMonitor", "PrometheusRule"}
"""Kinds for which no package has models: they are checked by the other tests only."""
S3 = {"chispike-s3": {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}}
MADE_BY_THE_USER = {"chispike-raw"}
EVERYTHING = [*WHOLE, "vanilla with all components"]


def objects(name: str) -> list[dict]:
    return with_components("vanilla", OPTIONAL) if name == EVERYTHING[-1] else render(name)


def all_workloads() -> list[Workload]:
    return [workload for name in EVERYTHING for workload in workloads(objects(name))]


def training() -> list[Workload]:
    return [w for w in all_workloads() if w.spec["template"]["metadata"]["labels"] == RUN_LABELS]


def validate(version: str) -> None:
    seen = []
    for name in EVERYTHING:
        jobs = [{"apiVersion": "batch/v1", "kind": "Job", "spec": w.spec} for w in workloads(objects(name))]
        for document in [*objects(name), *jobs]:  # a Job inside a custom object is validated too
            if document["kind"] in UNPUBLISHED or document["kind"] in CUSTOM or document in seen:
                continue
            seen.append(document)
            kubernetes_validate.validate(document, version, strict=True)
    assert len(seen) > 10


@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
def test_every_object_is_strictly_valid(version):
    validate(version)


@pytest.mark.faults
@pytest.mark.parametrize("version", VERSIONS[1:-1])
def test_every_object_is_strictly_valid_in_the_versions_between(version):
    validate(version)


def test_the_validation_sees_a_misspelt_field():
    job = {**one(render("data-prep"), "Job", "chispike-prep")}
    job["spec"] = {**job["spec"], "podFailurePolicies": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("overlay", ["jobset", "kubeflow-trainer"])
def test_custom_objects_are_what_their_published_models_know(overlay):
    checked = [d for d in render(f"overlays/{overlay}") if d["kind"] in CUSTOM]
    assert checked
    for document in checked:
        read = CUSTOM[document["kind"]](document).to_dict()
        assert not lost(document, read), document["kind"]  # a model drops what it does not know


def lost(written, read, path: str = "") -> list[str]:
    """Where `read` lacks what was written; models add defaults and turn integers into floats."""
    if isinstance(written, dict):
        there = read or {}
        missing = [f"{path}.{key}" for key in written if key not in there]
        both = [key for key in written if key in there]
        return missing + [x for key in both for x in lost(written[key], there[key], f"{path}.{key}")]
    if isinstance(written, list):
        pairs = itertools.zip_longest(written, read or [])
        return [x for i, (a, b) in enumerate(pairs) for x in lost(a, b, f"{path}[{i}]")]
    return [] if written == read else [path]


def test_what_a_model_does_not_know_is_seen():
    document = one(render("overlays/jobset"), "JobSet")
    document = {**document, "spec": {**document["spec"], "failurePolicys": {"maxRestarts": 1}}}
    assert lost(document, CUSTOM["JobSet"](document).to_dict()) == [".spec.failurePolicys"]


def test_the_files_are_tidy():
    command = [sys.executable, "-m", "yamllint", "-s", "-c", str(K8S / ".yamllint"), str(K8S)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_jobset_and_a_runtime_hold_the_pods_of_the_base():
    (vanilla,), (jobset,), (runtime,) = (
        list(workloads(render(f"overlays/{name}"))) for name in ("vanilla", "jobset", "kubeflow-trainer")
    )
    assert jobset.spec == {**vanilla.spec, "backoffLimit": 0}
    assert runtime.spec["podFailurePolicy"] == vanilla.spec["podFailurePolicy"]
    for part in ("securityContext", "volumes", "terminationGracePeriodSeconds"):
        assert runtime.pod[part] == vanilla.pod[part]
    assert runtime.pod["containers"][0]["args"] == vanilla.pod["containers"][0]["args"]
    for overlay, kind in (("jobset", "JobSet"), ("kubeflow-trainer", "TrainingRuntime")):
        spec = one(render(f"overlays/{overlay}"), kind)["spec"]
        policy = (spec if kind == "JobSet" else spec["template"]["spec"])["failurePolicy"]
        assert policy["maxRestarts"] == 12  # a set without a policy fails with its first Job
        (rule,) = policy["rules"]
        assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
        assert not {d["kind"] for d in render(f"overlays/{overlay}")} & {"Job", "Service"}


@pytest.mark.parametrize("overlay", ["jobset", "kubeflow-trainer"])
def test_other_components_reach_the_pods_of_a_custom_object(overlay):
    (workload,) = workloads(with_components("vanilla", ("rdma", "topology", "s3-data", overlay)))
    assert workload.pod["containers"][0]["resources"]["limits"]["rdma/hca"] == 1
    assert "podAntiAffinity" in workload.pod["affinity"]
    assert {"secretRef": {"name": "chispike-s3"}} in workload.pod["containers"][0]["envFrom"]


def test_every_name_in_a_patch_or_a_replacement_exists():
    defined, named = set(), set()
    for path in K8S.rglob("*.yaml"):
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            if path.name != "kustomization.yaml":
                defined.add((document["kind"], document["metadata"]["name"]))
                continue
            selects = [patch["target"] for patch in document.get("patches", ()) if "target" in patch]
            for replacement in document.get("replacements", ()):
                selects += [replacement["source"], *(target["select"] for target in replacement["targets"])]
            named |= {(select["kind"], select["name"]) for select in selects}
    assert named <= defined, named - defined


@pytest.mark.parametrize("component", OPTIONAL)
def test_a_component_alone_changes_the_job(component):
    before, after = render("overlays/vanilla"), with_components("vanilla", (component,))
    assert one(after, "Job") != one(before, "Job")
    assert {(d["kind"], d["metadata"]["name"]) for d in before} <= {(d["kind"], d["metadata"]["name"]) for d in after}


def test_exit_codes_decide_as_the_program_means_them():
    for workload in all_workloads():
        rules = workload.spec["podFailurePolicy"]["rules"]
        main = workload.pod["containers"][0]["name"]
        codes = {rule["action"]: rule["onExitCodes"] for rule in rules if "onExitCodes" in rule}
        assert codes == {
            "FailJob": {"containerName": main, "operator": "In", "values": [EXIT_USAGE, EXIT_DATA]},
            "Ignore": {"containerName": main, "operator": "In", "values": [EXIT_STOPPED]},
        }
        disrupted = [{"type": "DisruptionTarget", "status": "True"}]
        assert [r for r in rules if "onPodConditions" in r] == [{"action": "Ignore", "onPodConditions": disrupted}]
        assert workload.spec["podReplacementPolicy"] == "Failed"
        assert workload.pod["restartPolicy"] == "Never"
        assert "backoffLimitPerIndex" not in workload.spec


def test_a_failure_that_all_nodes_share_may_come_a_dozen_times():
    for workload in training():
        nodes, limit = workload.spec.get("completions", 2), workload.spec["backoffLimit"]
        assert limit == 0 if workload.job != "chispike" else limit >= 12 * nodes  # 0 in what restarts all nodes


def test_the_try_on_one_machine_fits_into_a_default_minikube():
    """2 cores and 4 GB, of which Kubernetes itself takes 750m and some 200 MB."""
    (workload,) = workloads(render("overlays/cpu-smoke"))
    requests = [container["resources"]["requests"] for container in workload.containers]
    assert {one["cpu"] for one in requests} == {"500m"}
    assert max(int(one["memory"].replace("Gi", "000").removesuffix("Mi")) for one in requests) * 2 <= 3000


def test_deleting_the_try_on_one_machine_takes_no_checkpoints_along():
    claims = [
        {d["metadata"]["name"] for d in render(folder) if d["kind"] == "PersistentVolumeClaim"}
        for folder in ("storage", "overlays/cpu-smoke")
    ]
    assert all(claims)
    assert not set.intersection(*claims)


def test_no_container_may_more_than_it_needs():
    for workload in all_workloads():
        pod = workload.pod
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 10000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert not [volume for volume in pod["volumes"] if "hostPath" in volume]
        for container in workload.containers:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"]["drop"] == ["ALL"]
            assert "add" not in security["capabilities"]  # to another user than root it would give nothing
            assert "privileged" not in security


def test_volumes_are_there_and_what_is_written_lies_on_one():
    claims = {d["metadata"]["name"] for d in render("storage")} | MADE_BY_THE_USER
    for workload in all_workloads():
        here = claims | {d["metadata"]["name"] for d in workload.documents if d["kind"] == "PersistentVolumeClaim"}
        volumes = {volume["name"]: volume for volume in workload.pod["volumes"]}
        used = {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v}
        assert used <= here
        for container in workload.containers:
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            assert {mount["name"] for mount in mounts.values()} <= volumes.keys()
            variables = environment_of(workload, container)
            for name in ("HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "MPLCONFIGDIR"):
                if name in variables:
                    root = "/" + variables[name].split("/")[1]
                    assert not mounts[root].get("readOnly"), name
        shm = volumes.get("shm", {}).get("emptyDir")
        assert shm is None or shm["medium"] == "Memory"


def environment_of(workload: Workload, container: dict, index: int = 0) -> dict[str, str]:
    """With what a TrainJob and Kubeflow's controller add."""
    variables = environment(workload, container, index, S3)
    for train_job in (d["spec"]["trainer"] for d in workload.documents if d["kind"] == "TrainJob"):
        variables |= {entry["name"]: entry["value"] for entry in train_job["env"]}
        variables |= {
            "PET_NNODES": str(train_job["numNodes"]),
            "PET_NPROC_PER_NODE": str(train_job["numProcPerNode"]),
            "PET_NODE_RANK": str(index),
            "PET_MASTER_ADDR": f"{workload.job}-0.chispike",
            "PET_MASTER_PORT": "29400",
        }
    return variables


def test_images_are_of_this_version():
    images = {container["image"] for workload in all_workloads() for container in workload.containers}
    assert images == {f"chispike:{__version__}", f"chispike:{__version__}-cpu"}


def test_ports_labels_and_probes_agree():
    for workload in training():
        (container,) = workload.pod["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container[probe]["httpGet"]["port"] in ports
        paths = [container[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")]
        assert paths == ["/healthz", "/healthz", "/readyz"]
        policy = one(workload.documents, "NetworkPolicy")["spec"]
        inside = {"podSelector": {"matchLabels": RUN_LABELS}}
        assert policy["podSelector"] == inside["podSelector"]
        assert {"from": [inside]} in policy["ingress"]
        assert {"to": [inside]} in policy["egress"]
        (monitored,) = [rule for rule in policy["ingress"] if rule["from"] != [inside]]
        assert [port["port"] for port in monitored["ports"]] == ["metrics"]
        assert monitored["from"][0]["namespaceSelector"]
        for service in (d for d in workload.documents if d["kind"] == "Service"):
            assert service["spec"]["clusterIP"] == "None"
            assert service["spec"]["publishNotReadyAddresses"] is True
            assert service["spec"]["selector"] == RUN_LABELS
            assert service["metadata"]["name"] == workload.pod["subdomain"]
            (port,) = service["spec"]["ports"]
            assert port["targetPort"] in ports
            assert port["port"] == ports[port["targetPort"]]


def test_the_pod_monitor_finds_the_pods_and_their_port():
    documents = render("overlays/prometheus-operator")
    monitor = one(documents, "PodMonitor")["spec"]
    (workload,) = workloads(documents)
    assert monitor["selector"] == {"matchLabels": workload.spec["template"]["metadata"]["labels"]}
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in workload.pod["containers"][0]["ports"]}
    assert endpoint["path"] == "/metrics"
    named = {one["targetLabel"]: one["sourceLabels"] for one in endpoint["relabelings"]}
    assert named == {"instance": ["__meta_kubernetes_pod_name"], "node_name": ["__meta_kubernetes_pod_node_name"]}


def test_the_operators_rules_are_those_of_the_plain_prometheus():
    plain = yaml.safe_load((K8S / "monitoring/rules.yml").read_text(encoding="utf-8"))
    made = yaml.safe_load((K8S / "overlays/prometheus-operator/prometheusrule.yaml").read_text(encoding="utf-8"))
    assert made["spec"] == plain, "run: python k8s/overlays/prometheus-operator/rules.py"
    rendered = one(render("overlays/prometheus-operator"), "PrometheusRule")["spec"]
    assert squeezed(rendered) == squeezed(plain)


def squeezed(value):
    """Without the white space in expressions, which has no meaning and which kustomize changes."""
    if isinstance(value, dict):
        return {key: squeezed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [squeezed(inner) for inner in value]
    return " ".join(value.split()) if isinstance(value, str) else value


def test_a_component_for_data_elsewhere_opens_the_way_there():
    after = with_components("vanilla", ("s3-data",))
    (workload,) = workloads(after)
    assert {"ports": [{"port": 443, "protocol": "TCP"}]} in one(after, "NetworkPolicy")["spec"]["egress"]
    assert "data" not in {volume["name"] for volume in workload.pod["volumes"]}
    assert environment_of(workload, workload.pod["containers"][0])["AWS_ACCESS_KEY_ID"] == "key"


def test_the_packing_job_calls_its_program_rightly(tmp_path):
    (workload,) = workloads(render("data-prep"))
    (container,) = workload.pod["containers"]
    words = argv(container, environment_of(workload, container), tmp_path)
    assert words[:2] == ["-m", "data_prep"]
    arguments = prep_parser().parse_args(words[2:])
    assert arguments.command == "imagenet"
    assert arguments.workers == int(container["resources"]["requests"]["cpu"])
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    assert {Path(path).parts[1] for path in (arguments.train, arguments.val, arguments.devkit)} == {"raw"}
    assert mounts == {"/raw": True, "/data": False, "/tmp": False}
    assert arguments.directory.startswith("/data/")


def test_the_smoke_test_packs_what_it_trains_on(tmp_path):
    (workload,) = workloads(render("overlays/cpu-smoke"))
    (packing,), (node,) = workload.pod["initContainers"], workload.pod["containers"]
    python, *words = packing["command"]
    assert python == "python"
    target = words[-1]
    assert f"--data.path {target} " in environment_of(workload, node)["OVERRIDES"]
    done = run_python([*words[:-1], str(tmp_path / "digits")], {"HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "digits/train/manifest.json").exists()


TRAINING = ["vanilla", "cpu-smoke", "jobset", "kubeflow-trainer"]


def commands(overlay: str, tmp_path: Path) -> Iterator[tuple[Workload, dict[str, str], list[str]]]:
    """The Job, and for each of its pods the environment and the arguments of `python`."""
    (workload,) = workloads(render(f"overlays/{overlay}"))
    (container,) = workload.pod["containers"]
    for index in range(2):
        variables = environment_of(workload, container, index)
        yield workload, variables, argv(container, variables, tmp_path)


@pytest.mark.parametrize("overlay", TRAINING)
def test_every_pod_finds_its_place_and_its_run(overlay, tmp_path):
    for index, (workload, variables, words) in enumerate(commands(overlay, tmp_path)):
        assert words[:2] == ["-m", "launch.supervise"]
        given, train = supervise.command_line(words[2:])
        place = resolve(vars(given), variables)
        assert (place.nodes, place.rank, place.master) == (2, index, f"{workload.job}-0.chispike")
        assert workload.spec.get("completions", 2) == workload.spec.get("parallelism", 2) == 2
        config = options.parse(train)
        config.accumulation(place.nodes * place.slots)  # raises where the batch does not divide
        (container,) = workload.pod["containers"]
        limits = container["resources"]["limits"]
        for train_job in (d["spec"]["trainer"] for d in workload.documents if d["kind"] == "TrainJob"):
            limits = train_job["resourcesPerNode"]["limits"]
        assert limits.get("nvidia.com/gpu", 1) == place.slots
        taint = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        assert (taint in workload.pod.get("tolerations", [])) == ("nvidia.com/gpu" in limits)
        mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
        assert mounts["/" + config.run_dir.split("/")[1]] is False
        assert mounts["/" + config.data.path.split("/")[1]] is True
        assert (given.metrics_host, given.metrics_port) == ("0.0.0.0", training_port(workload))
        pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
        assert workload.pod["terminationGracePeriodSeconds"] >= pause + given.grace + 20


@pytest.mark.faults
@pytest.mark.parametrize("overlay", TRAINING)
def test_the_program_itself_describes_the_run(overlay, tmp_path):
    _, variables, words = next(commands(overlay, tmp_path))
    done = run_python([*words[:2], "--dry-run", *words[2:]], {**variables, "HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert "node 0 of 2" in done.stdout
    ranks = 2 if overlay == "cpu-smoke" else 8
    assert f" = {ranks} ranks x " in done.stdout
