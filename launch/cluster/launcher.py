"""How DeepSpeed's launcher is started on a node: which ranks on which GPUs, the command, the environment."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launch.cluster.placement import Placement
from launch.devices import MASK, count_gpus, listed, named_gpus, num_ranks
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.ranks.cores import NVIDIA

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "launch" / "train.py"


def with_ranks(place: Placement, config: Config, environ: Mapping[str, str]) -> Placement:
    """`place` with its number of ranks (the given one, else by the GPUs), on the GPUs that the environment leaves.

    Raises:
        ConfigError: CUDA_VISIBLE_DEVICES holds no indices, or leaves fewer GPUs than ranks.
        TorchError: torch is needed to count the GPUs, and cannot be imported.
    """
    named, told = named_gpus(environ), environ.get("DS_ACCELERATOR")
    if place.slots and not named and (told or NVIDIA.exists()):
        return place
    num_gpus = 0 if told == "cpu" else count_gpus()
    place = replace(place, without_gpu=num_gpus == 0 and not told)
    slots = place.slots or num_ranks(config.data, num_gpus, place.nodes)
    if not place.slots and slots < num_gpus:
        micro_batches = config.data.global_batch // config.data.micro_batch
        print(f"{micro_batches} micro-batches a step use {slots} of {num_gpus} GPUs of a node", file=sys.stderr)
    if not named or num_gpus == 0:
        return replace(place, slots=slots)
    if slots > num_gpus:
        raise ConfigError(
            f"--slots {slots} is not allowed with {MASK}={environ[MASK]}, which leaves {num_gpus} of this machine's "
            "GPUs; use as many, or change that variable"
        )
    return replace(place, slots=slots, gpus=named[:slots])


def hostfile(place: Placement) -> str:
    """DeepSpeed's hostfile. With --no_ssh the launcher never looks the names up: only their order and slots matter."""
    own = max(place.gpus, default=-1) + 1
    slots = [max(own, place.slots) if node == place.rank else place.slots for node in range(place.nodes)]
    return "".join(f"node-{node} slots={count}\n" for node, count in enumerate(slots))


def command(place: Placement, hostfile_at: Path, train: Sequence[str]) -> list[str]:
    """The command that starts this node's ranks."""
    where = ["--master_port", str(place.port)]
    if place.nodes > 1:
        where += ["--hostfile", str(hostfile_at), "--no_ssh", "--node_rank", str(place.rank)]
        where += ["--master_addr", place.master]
    elif not place.gpus:
        where += ["--num_accelerators", str(place.slots)]
    if place.gpus:
        where += ["--include", included(place)]
    # This level hides one error, that a rank ended with an exit code: the command that starts the launcher says that.
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical", *where, str(TRAIN), *train]


def included(place: Placement) -> str:
    """The GPUs of every node as DeepSpeed's --include has them. Of other nodes only their number matters here."""
    if place.nodes == 1:
        return f"localhost:{listed(place.gpus)}"
    first = tuple(range(place.slots))
    return "@".join(f"node-{node}:{listed(place.gpus if node == place.rank else first)}" for node in range(place.nodes))


def environment(place: Placement, environ: Mapping[str, str], **variables: str) -> dict[str, str]:
    """The environment of launcher and ranks: `environ` and `variables`, with this program's folder in PYTHONPATH."""
    path = environ.get("PYTHONPATH")
    # DeepSpeed looks for numactl in PATH, and fails at a folder that it may not enter, such as another user's.
    paths = [folder for folder in environ.get("PATH", os.defpath).split(":") if os.access(folder or ".", os.X_OK)]
    ranks = {**environ, **variables, "PATH": ":".join(paths), "PYTHONPATH": f"{ROOT}:{path}" if path else str(ROOT)}
    if MASK in ranks and not named_gpus(environ):
        ranks["DS_ACCELERATOR"] = "cpu"  # all GPUs are hidden, and the launcher would show them to the ranks again
    if place.without_gpu:
        ranks["DS_ACCELERATOR"] = "cpu"  # otherwise each of the launcher's processes warns of it
    if place.gpus:
        del ranks[MASK]  # the launcher sets it anew, and would warn that it ignores ours
    return ranks
