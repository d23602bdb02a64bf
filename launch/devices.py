"""Prints the `deepspeed` launcher's device options for this machine:  deepspeed $(python -m launch.devices RECIPE) …

All GPUs that the recipe's batch divides over, or two CPU ranks where there is no GPU.
"""

import sys

from launch.recipes import RECIPES
from pipeline.config import DataConfig

CPU_RANKS = 2


def num_ranks(data: DataConfig, num_gpus: int) -> int:
    """The most GPUs that the global batch divides over, or two CPU ranks where there is no GPU."""
    if num_gpus == 0:
        return CPU_RANKS
    micro_batches = data.global_batch // data.micro_batch
    return max(ranks for ranks in range(1, min(num_gpus, micro_batches) + 1) if micro_batches % ranks == 0)


def options(recipe: str, num_gpus: int) -> str:
    """The launcher's options; a GPU that the global batch cannot be divided over stays idle, and that is said."""
    data = RECIPES[recipe]().data
    used = num_ranks(data, num_gpus)
    if num_gpus == 0:
        return f"--num_accelerators {used}"
    if used < num_gpus:
        micro_batches = data.global_batch // data.micro_batch
        print(f"{recipe}: {micro_batches} micro-batches a step use {used} of {num_gpus} GPUs", file=sys.stderr)
    return f"--num_gpus {used}"


if __name__ == "__main__":
    import torch

    print(options(sys.argv[1], torch.cuda.device_count()))
