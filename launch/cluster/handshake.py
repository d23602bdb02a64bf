"""What a node says of itself when the nodes meet, and why some of them cannot train together."""

import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.cluster.placement import Placement
from pipeline.config import Config
from pipeline.data.manifest import TRAIN, check_splits, load_manifest
from pipeline.errors import EXIT_DATA, EXIT_INTERNAL, EXIT_USAGE, ConfigError, DataError, StoreError, is_outage
from pipeline.run_dir import code_version, run_folder
from pipeline.snn.networks import own_source

Refusal = ConfigError | DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """What a node says of itself."""

    node: int
    nodes: int
    slots: int
    source: str
    """Version of its code, see pipeline/run_dir/code_version.py."""
    data: str
    """Identity of its training split."""
    problem: str
    """Why it cannot train, and so no node can; empty where it can."""
    host: str
    code: int = EXIT_USAGE
    """Exit code of every node, where this one has a problem."""
    network: str = ""
    """Hash of the code of a user's own network; empty for another."""
    token: str = ""
    """What it wrote into the run's folder; node 0 must find it there."""

    def but(self, problem: Refusal | None) -> "Hello":
        """The same node with this problem, if there is one."""
        return self if problem is None else replace(self, problem=str(problem)[:1000], code=problem.exit_code)


def introduce(place: Placement, config: Config) -> Hello:
    """What this node says of itself. Its problem is found before ranks start: otherwise its ranks would end, and those
    of the other nodes would wait for them in vain.
    """
    identity, network, problem = "", "", None
    try:
        source = own_source.find(config.model.arch)
        network = "" if source is None else source.digest
        identity = load_manifest(config.data, TRAIN).identity
        check_splits(config.data)
        run_folder.admit(config, place.nodes * place.slots)
        run_folder.refuse_other_data(config, identity)
        if source is not None:
            run_folder.refuse_other_network(config, source.digest, source.folder)
    except (ConfigError, DataError) as error:
        problem = error
    hello = Hello(
        node=place.rank,
        nodes=place.nodes,
        slots=place.slots,
        source=code_version.version(),
        data=identity[:16],
        network=network[:16],
        problem="",
        host=socket.gethostname(),
    )
    return hello.but(problem)


def why_not(own: Hello, others: Sequence[Hello]) -> str:
    """Why these nodes cannot train together; empty where they can."""
    hosts = {own.node: own.host}
    fields = {"nodes": "--nodes", "slots": "--slots", "source": "code version", "data": "data's identity"}
    fields["network"] = "the code of model.arch"
    for node in (own, *others):
        if node.problem:
            return f"node {node.node} ({node.host}) cannot train: {node.problem}"
    for other in others:
        for field, what in fields.items():
            ours, theirs = (getattr(node, field) or "none" for node in (own, other))
            if ours != theirs:
                return (
                    f"{what} is {theirs} on node {other.node} ({other.host}) and {ours} on node 0 ({own.host}); start "
                    "every node with the same"
                )
        if other.node in hosts or not 0 < other.node < own.nodes:
            rival = hosts.get(other.node, "no other")
            return f"--node-rank {other.node} was given to {other.host} and to {rival}; count the nodes from 0"
        hosts[other.node] = other.host
    return ""


def unshared(nodes: Iterable[Hello], folder: Path) -> str:
    """The error where a node writes into another folder than this one; empty where all write into this one.

    Raises:
        OSError: the folder's storage is gone.
    """
    for node in nodes:
        try:
            shared = mark(folder, node.node).read_text() == node.token
        except OSError as error:
            if is_outage(error):
                raise
            shared = False
        if not shared:
            return (
                f"run_dir={str(folder)!r} is not the same folder on node {node.node} ({node.host}); put it on a file "
                "system that all nodes share"
            )
    return ""


def mark(folder: Path, node: int) -> Path:
    """Where in the run's folder a node writes its token."""
    return folder / f".node-{node}"


def refusal(reason: str, code: int) -> Refusal:
    """The exception with which a node ends for `reason`, with the exit code `code`."""
    return {EXIT_DATA: DataError, EXIT_INTERNAL: StoreError}.get(code, ConfigError)(reason)
