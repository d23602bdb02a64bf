"""A rank's share of this machine's cores, and whether the processor has bf16."""

import os
import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
NVIDIA = Path("/dev/nvidiactl")


def cores_per_rank() -> int:
    """This rank's share of the cores that the job may use on this machine, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // local_ranks(1))


def local_ranks(untold: int) -> int:
    """The number of ranks on this machine: DeepSpeed's launcher sets LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.

    Returns `untold` if neither is set.
    """
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or untold)


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies in bf16 (AVX-512 or AMX, or Arm's bf16); if not, bf16 is emulated, slowly.

    True if the system does not tell.
    """
    try:
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        return True
    return flags is None or not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags[1].split())


def quick_precision() -> str:
    """`train.precision` of recipes that also train on a CPU: bf16, or fp32 without a GPU on a CPU without bf16."""
    return "bf16" if NVIDIA.exists() or cpu_has_bf16() else "fp32"
