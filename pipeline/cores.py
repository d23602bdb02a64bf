"""How many cores a rank may use."""

import os


def cores_per_rank() -> int:
    """This rank's share of the cores that the job may use on this machine, at least 1.

    DeepSpeed's launcher tells the number of ranks on the machine in LOCAL_SIZE, torchrun in LOCAL_WORLD_SIZE.
    """
    ranks = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1"
    return max(1, len(os.sched_getaffinity(0)) // int(ranks))
