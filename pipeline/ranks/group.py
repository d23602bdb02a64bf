"""The process group: joining it, what its ranks agree on, and how a lost rank is noticed.

Import it before any other part of DeepSpeed is used: it also turns off what a run does not need.
"""

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import deepspeed.comm
import torch
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d

from pipeline.config import Config
from pipeline.errors import ConfigError, LostRankError, first_line
from pipeline.ranks.cores import cores_per_rank

# DeepSpeed would compile a C++ operator that only its inference uses, and crash where there is no compiler.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# At every start DeepSpeed notes that SGD is "untested with ZeRO"; tests/test_training.py tests it.
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# DeepSpeed 0.19 calls collectives by names that torch 2.13 renamed.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")

TESTED = ((0, 19, 8), (0, 20, 0))
"""Tested DeepSpeed versions, from the first to below the second: its gradient reduction is not part of its API."""


def refuse_untested_deepspeed() -> None:
    """Raises ConfigError where DeepSpeed's version is outside `TESTED`."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", deepspeed.__version__)
    version = tuple(int(number) for number in numbers.groups()) if numbers else ()
    first, end = TESTED
    if not first <= version < end:
        allowed = f">={'.'.join(map(str, first))},<{'.'.join(map(str, end[:2]))}"
        raise ConfigError(
            f"deepspeed=={deepspeed.__version__} is not allowed: χ is read inside its gradient reduction, tested with "
            f'{allowed}; run: pip install -c constraints.txt "deepspeed{allowed}"'
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Rank and device of this process in the job."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device


def join(config: Config) -> Place:
    """Joins the process group (the launcher set RANK, LOCAL_RANK and WORLD_SIZE) and takes this rank's device.

    Raises:
        ConfigError: a version of DeepSpeed that was not tested.
    """
    refuse_untested_deepspeed()
    accelerator = get_accelerator()
    assert accelerator is not None
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if accelerator.device_name() == "cpu":
        device = torch.device("cpu")
        torch.set_num_threads(cores_per_rank())
    else:
        device = torch.device(accelerator.device_name(local_rank))
        accelerator.set_device(local_rank)
    timeout = timedelta(seconds=config.train.timeout_s)
    deepspeed.init_distributed(accelerator.communication_backend_name(), verbose=False, timeout=timeout)
    torch.manual_seed(config.train.seed)
    return Place(deepspeed.comm.get_rank(), local_rank, deepspeed.comm.get_world_size(), device)


def of_rank_0(value: Any) -> Any:
    """Rank 0's `value` on every rank, since each rank might have read another one. A collective."""
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def set_timeouts(seconds: float) -> None:
    """Lets every collective of every group fail after `seconds`, so that a silent rank or link is noticed.

    DeepSpeed makes groups of its own. Their timeout is torch's, 10 (nccl) or 30 minutes, whatever the first group has.
    """
    # torch has no public list of groups, and none of its public names changes a timeout.
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


@contextmanager
def answered(config: Config) -> Iterator[None]:
    """Turns the error of a collective, when another rank is gone or silent, into a LostRankError of one line."""
    try:
        yield
    except RuntimeError as error:
        reason = first_line(error)
        if not isinstance(error, torch.distributed.DistError) and "gloo/transport" not in reason:
            raise
        reason = re.sub(r"^\[\S+\] ", "", reason).split(". ")[0]  # without gloo's file, line and advice
        raise LostRankError(
            f"another rank is gone, or did not answer within train.timeout_s={config.train.timeout_s:g} ({reason}); "
            "look for its last lines above, and run again to go on from the newest checkpoint"
        ) from error


def leave() -> None:
    """Leaves the process group in order: if the interpreter's exit destroys it, the rank can abort."""
    if deepspeed.comm.is_initialized():
        deepspeed.comm.barrier()
        deepspeed.comm.destroy_process_group()
