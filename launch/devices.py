"""The GPUs of this machine, and how many ranks a node has for them.

All GPUs that the recipe's batch divides over, of those that CUDA_VISIBLE_DEVICES leaves, or two CPU ranks where there
is no GPU. DeepSpeed's launcher takes the variable away and numbers GPUs itself, so they are named to it.
"""

import subprocess
import sys
from collections.abc import Mapping

from pipeline.config import DataConfig
from pipeline.errors import EXIT_INTERNAL, ConfigError

CPU_RANKS = 2
MASK = "CUDA_VISIBLE_DEVICES"


class TorchError(RuntimeError):
    """torch cannot be imported here; the message is one line."""

    exit_code = EXIT_INTERNAL


def num_ranks(data: DataConfig, num_gpus: int, nodes: int = 1) -> int:
    """The most of a node's GPUs, or of two CPU ranks without any, that the global batch divides over on all nodes.

    All of them where there is no such number: who starts the ranks says what does not fit.
    """
    most = num_gpus or CPU_RANKS
    micro_batches = data.global_batch // data.micro_batch
    return next((ranks for ranks in range(most, 0, -1) if micro_batches % (nodes * ranks) == 0), most)


def count_gpus() -> int:
    """GPUs that torch sees here: in a process of its own, since importing it takes seconds and much memory.

    Raises:
        TorchError: it cannot be imported.
    """
    code = "import torch; print(torch.cuda.device_count())"
    command = [sys.executable, "-c", code]
    # In a session of its own, where Ctrl-C does not look like an import that fails.
    done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    if done.returncode != 0:
        *_, reason = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise TorchError(f"torch cannot be imported by {sys.executable} ({reason}); install what it lacks")
    return int(done.stdout.split()[-1])


def named_gpus(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, by index, none for "" and "-1"; None where it is not set.

    Raises:
        ConfigError: it does not hold indices.
    """
    if MASK not in environ:
        return None
    words = [word.strip() for word in environ[MASK].split(",")]
    indices = words[: next((at for at, word in enumerate(words) if word in ("", "-1")), len(words))]  # as CUDA reads it
    if not all(word.isdecimal() for word in indices) or len(set(indices)) != len(indices):
        raise ConfigError(
            f"{MASK}={environ[MASK]} is not allowed, since DeepSpeed's launcher knows GPUs by their numbers alone; use "
            "different indices, as in 2,3 (nvidia-smi -L lists them beside their UUIDs)"
        )
    return tuple(map(int, indices))


def listed(gpus: tuple[int, ...]) -> str:
    return ",".join(map(str, gpus))
