"""This node's place in the job: from the command line, else from the variables of Kubernetes, Kubeflow or Slurm.

| source | nodes | this node | node 0 | ranks a node |
|---|---|---|---|---|
| arguments | --nodes | --node-rank | --master, --master-port | --slots |
| Indexed Job | CHISPIKE_NODES | JOB_COMPLETION_INDEX | CHISPIKE_MASTER | |
| JobSet | CHISPIKE_NODES | JOB_COMPLETION_INDEX | JOBSET_NAME, REPLICATED_JOB_NAME | |
| Kubeflow Trainer | PET_NNODES | PET_NODE_RANK | PET_MASTER_ADDR, PET_MASTER_PORT | PET_NPROC_PER_NODE |
| Slurm | SLURM_STEP_NUM_NODES, SLURM_NNODES | SLURM_NODEID | SLURM_STEP_NODELIST, SLURM_JOB_NODELIST | |

An argument wins over variables. Two variables that contradict each other are refused, and so is a missing part.
JOBSET_NAME and REPLICATED_JOB_NAME are the pod's labels jobset.sigs.k8s.io/{jobset-name,replicatedjob-name}, which a
manifest puts into the environment by fieldRef; pod 0 of that job is then node 0.
"""

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import ConfigError

MASTER_PORT = 29500
LOCAL = "127.0.0.1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """This node among the nodes of a job."""

    nodes: int
    rank: int
    """From 0; node 0 has the ranks from 0 on."""
    master: str
    """Name or address of node 0."""
    port: int
    """On node 0: the nodes meet there, then the ranks."""
    slots: int
    """Ranks on each node; 0 where nothing says it."""
    gpus: tuple[int, ...] = ()
    """Indices of the GPUs of this node's ranks; empty: from 0 on, or none."""
    without_gpu: bool = False
    """torch was asked, and sees no GPU here."""


def resolve(given: Mapping[str, str | int | None], environ: Mapping[str, str]) -> Placement:
    """The place that the arguments `given` (nodes, rank, master, port, slots; None: not given) or `environ` say.

    Raises:
        ConfigError: a contradiction, a missing part, or something impossible; the message is one line.
    """
    if "PET_NNODES" not in environ and environ.get("SLURM_LOCALID", "0") != "0" and given["nodes"] is None:
        raise ConfigError(
            f"SLURM_LOCALID={environ['SLURM_LOCALID']}: a supervisor starts all ranks of its node, so one a node is "
            "enough; use srun --ntasks-per-node=1"
        )
    said = {field: _one(field, given[field], claims) for field, claims in _claims(environ).items()}
    nodes, rank, master = said["nodes"], said["rank"], said["master"]
    if nodes is None:
        others = [name for name, value in (("node-rank", rank), ("master", master)) if value is not None]
        if others:
            raise ConfigError(
                f"the number of nodes is missing beside {' and '.join(others)}; give --nodes or set CHISPIKE_NODES "
                "(--nodes 1 for one machine)"
            )
        nodes = 1
    count = _number("the number of nodes", nodes, 1, 100_000)
    if count == 1:
        rank, master = rank or 0, LOCAL
    if rank is None:
        raise ConfigError(f"node-rank is missing for {count} nodes; give --node-rank or set JOB_COMPLETION_INDEX")
    if master is None:
        raise ConfigError(f"the master is missing for {count} nodes; give --master HOST or set CHISPIKE_MASTER")
    master, beside = host_and_port(str(master))
    if (
        beside is not None
        and said["port"] is not None
        and int(beside) != _number("master-port", said["port"], 1, 65535)
    ):
        raise ConfigError(f"--master names port {beside} and --master-port {said['port']}; give one of them")
    said["port"] = beside if said["port"] is None else said["port"]
    return Placement(
        nodes=count,
        rank=_number(f"node-rank among {count} nodes", rank, 0, count - 1),
        master=master,
        port=_number("master-port", MASTER_PORT if said["port"] is None else said["port"], 1, 65535),
        slots=0 if said["slots"] is None else _number("slots", said["slots"], 1, 1024),
    )


def _claims(environ: Mapping[str, str]) -> dict[str, list[tuple[str, str]]]:
    """By field, what each variable says of it: (the variable's name, its value)."""

    def of(*names: str) -> list[tuple[str, str]]:
        return [(name, environ[name]) for name in names if environ.get(name)]

    slurm = of("SLURM_STEP_NUM_NODES") or of("SLURM_NNODES") or of("SLURM_JOB_NUM_NODES")
    hosts = of("SLURM_STEP_NODELIST") or of("SLURM_JOB_NODELIST")
    master = of("CHISPIKE_MASTER")
    jobset, job = environ.get("JOBSET_NAME"), environ.get("REPLICATED_JOB_NAME")
    if not master and jobset and job:
        master = [("JOBSET_NAME", f"{jobset}-{job}-0-0.{jobset}")]
    if not master:  # both names above win: PET_MASTER_ADDR may be another name of the same node
        master = of("PET_MASTER_ADDR") or [(name, first_host(value)) for name, value in hosts]
    elastic = [(name, fixed_size(value)) for name, value in of("PET_NNODES")]
    # "auto", "gpu" and "cpu" leave the number to what the machine has.
    slots = [(name, value) for name, value in of("PET_NPROC_PER_NODE") if value not in ("auto", "gpu", "cpu")]
    return {
        "nodes": of("CHISPIKE_NODES") + elastic + slurm,
        "rank": of("JOB_COMPLETION_INDEX", "PET_NODE_RANK", "SLURM_NODEID"),
        "master": master,
        "port": of("PET_MASTER_PORT"),
        "slots": slots,
    }


def _one(field: str, given: str | int | None, claims: list[tuple[str, str]]) -> str | int | None:
    """The argument, else what all variables say; None where none does."""
    if given is not None:
        return given
    for name, value in claims[1:]:
        if value != claims[0][1]:
            option = {"rank": "node-rank", "port": "master-port"}.get(field, field)
            raise ConfigError(f"{claims[0][0]}={claims[0][1]} contradicts {name}={value}; give --{option}")
    return claims[0][1] if claims else None


def host_and_port(master: str) -> tuple[str, str | None]:
    """The host and the port that `master` names: `node-0`, `10.0.0.1`, `fd00::1`, each with `:PORT` or without; an IPv6
    address then in square brackets. The port is None where it names none.

    Raises:
        ConfigError: it names no host, such as `user@node-0` or `tcp://node-0`.
    """
    bracketed = re.fullmatch(r"\[([^\[\]]+)\](?::(\d+))?", master)
    plain = re.fullmatch(r"([^:]*):(\d+)", master)
    host, port = bracketed.groups() if bracketed else plain.groups() if plain else (master, None)
    try:
        is_v6 = ipaddress.ip_address(host).version == 6
    except ValueError:
        is_v6 = False
    is_name = not bracketed and re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?", host)
    if not is_v6 and not is_name:
        raise ConfigError(
            f"master={master!r} is not allowed: the nodes meet by TCP, not by ssh; give the name or address of node 0 "
            "alone, such as node-0, 10.0.0.1 or fd00::1, or with its port, node-0:29500 or [fd00::1]:29500"
        )
    return host, None if port is None else str(_number("the port of the master", port, 1, 65535))


def _number(what: str, value: str | int, low: int, high: int) -> int:
    if re.fullmatch(r"-?\d+", str(value)) and low <= int(value) <= high:
        return int(value)
    raise ConfigError(f"{what}: {value!r} is not allowed; use {low}" + (f" to {high}" if high > low else ""))


def fixed_size(nodes: str) -> str:
    """PET_NNODES without its elastic form: "2" and "2:2" are 2."""
    least, _, most = nodes.partition(":")
    if most not in ("", least):
        raise ConfigError(
            f"PET_NNODES={nodes} is not allowed: a run keeps its number of nodes; give one number (to resize a run, "
            "stop it and start it at another size)"
        )
    return least


def first_host(nodelist: str) -> str:
    """The first name of a Slurm list: `gpu[03-05,9],login` → gpu03."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    if not first:
        raise ConfigError(f"the Slurm node list {nodelist!r} names no node; give --master HOST")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])
