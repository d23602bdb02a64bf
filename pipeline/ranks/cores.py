"""A rank's share of this machine's cores, and whether the processor has bf16."""

import os
import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
NVIDIA = Path("/dev/nvidiactl")


def cores_per_rank() -> int:
    """The threads that this rank may use, at least 1: what OMP_NUM_THREADS says, else its share of this machine's cores
    that the affinity mask and the CPU quota leave to the job (`docker --cpus`, the CPU limit of a pod, a Slurm job).

    More threads than the quota allows do not compute: they are stopped in the middle of each step.
    """
    cores = float(len(os.sched_getaffinity(0)))
    if (quota := cpu_quota()) is not None:
        cores = min(cores, quota)
    return max(1, int(min(_asked_threads() or cores // local_ranks(1), cores)))


def _asked_threads() -> int:
    """What OMP_NUM_THREADS says (the first of a list, which is by level of nesting); 0 where it says nothing."""
    said = re.match(r"\s*([1-9]\d{0,5})\s*(?:,|$)", os.environ.get("OMP_NUM_THREADS", ""))
    threads = int(said[1]) if said else 0
    by_torchrun = threads == 1 and "TORCHELASTIC_RUN_ID" in os.environ  # it sets 1 where the user has set nothing
    return 0 if by_torchrun else threads


def cpu_quota(proc: Path = Path("/proc/self")) -> float | None:
    """The least quota of CPUs in the control groups of a process and all groups above it, of cgroup v1 and v2.

    Args:
        proc: folder of the process in /proc.

    Returns:
        CPUs, such as 0.5; None where there is no quota.
    """
    try:
        groups = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        mounts = [line.split(" - ") for line in (proc / "mountinfo").read_text().splitlines()]
    except OSError:
        return None
    found = []
    for before, after in (mount for mount in mounts if len(mount) == 2):
        root, point = (field.replace("\\040", " ") for field in before.split()[3:5])
        kind, *_, options = after.split()
        first = kind == "cgroup" and "cpu" in options.split(",")
        if not first and kind != "cgroup2":
            continue
        for _, controllers, path in (group for group in groups if len(group) == 3 and group[2].startswith("/")):
            if ("cpu" in controllers.split(",")) if first else not controllers:
                # In a container the mount shows the container's own group; its path may be as the host sees it.
                below = os.path.relpath(path, root) if os.path.commonpath([path, root]) == root else "."
                found += [_quota(folder, first) for folder in _upwards(Path(point), below)]
    return min((quota for quota in found if quota is not None), default=None)


def _upwards(mount: Path, below: str) -> list[Path]:
    """The group's folder and those above it, up to the mount."""
    folder = mount / below
    return [folder, *(above for above in folder.parents if above == mount or mount in above.parents)]


def _quota(folder: Path, first: bool) -> float | None:
    """The quota that a group's files say, of cgroup v1 (`first`) or v2; None for none."""
    try:
        if first:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        else:
            quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # the root has no file; "max" is no number
        return None


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
