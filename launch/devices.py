"""The GPUs of this machine, and how many ranks a node has for them.

One rank for each GPU that CUDA_VISIBLE_DEVICES leaves, as far as the recipe's batch divides over them; without a GPU
two CPU ranks. DeepSpeed's launcher removes the variable and numbers the GPUs itself, so it is given their indices.
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
    """Ranks on each node: as many of its GPUs (or of two CPU ranks) as the global batch divides over on all nodes.

    All of them where no number fits: the check of the batch, when the ranks start, then names the error.
    """
    most = num_gpus or CPU_RANKS
    micro_batches = data.global_batch // data.micro_batch
    return next((ranks for ranks in range(most, 0, -1) if micro_batches % (nodes * ranks) == 0), most)


def count_gpus() -> int:
    """The number of GPUs that torch sees. A process of its own imports torch: that takes seconds and much memory.

    Raises:
        TorchError: torch cannot be imported.
    """
    code = "import torch; print(torch.cuda.device_count())"
    command = [sys.executable, "-c", code]
    # In a session of its own: there no Ctrl-C ends the import, which would look like an error of torch.
    done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    if done.returncode != 0:
        *_, reason = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise TorchError(f"torch cannot be imported by {sys.executable} ({reason}); install what it lacks")
    return int(done.stdout.split()[-1])


def named_gpus(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """Indices of the GPUs that CUDA_VISIBLE_DEVICES leaves: () for "" and "-1"; None where it is not set.

    Raises:
        ConfigError: the variable holds something else than different indices.
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
