"""A DeepSpeed engine from a `Config`: distributed start-up, and the engine with its optimizer."""

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
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn
from torch.distributed import distributed_c10d

from pipeline.config import Config, OptimConfig
from pipeline.engine.deepspeed_settings import deepspeed_settings
from pipeline.errors import ConfigError, LostRankError, first_line
from pipeline.ranks.cores import cores_per_rank, cpu_has_bf16
from pipeline.snn.kernels.norm import Ranks
from pipeline.snn.neurons import Neuron, NeuronState

log = logging.getLogger(__name__)

# DeepSpeed would compile a C++ operator that only its inference uses, and crash where there is no compiler.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# Its note on every start that SGD is "untested with ZeRO" is answered by tests/test_training.py.
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# DeepSpeed 0.19 calls collectives by names that torch 2.13 renamed.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")


TESTED = ((0, 19, 8), (0, 20, 0))
"""DeepSpeed from the first version on and below the second: where it reduces gradients is not part of its API."""


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
    """Where this process stands in the job."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device


def join(config: Config) -> Place:
    """Joins the other ranks (the launcher set RANK, LOCAL_RANK and WORLD_SIZE) and takes this rank's device.

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
    """Rank 0's `value` on every rank: what all act on and each might have read otherwise. A collective."""
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def set_timeouts(seconds: float) -> None:
    """Every collective of every group fails after `seconds`, so that a silent rank or link is noticed.

    DeepSpeed makes groups of its own, for which torch takes 10 (nccl) or 30 minutes whatever the first group was given.
    """
    # torch has no public list of groups, and none of its public names changes a timeout.
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


@contextmanager
def answered(config: Config) -> Iterator[None]:
    """What a collective fails with where another rank is gone or silent, as one line: LostRankError."""
    try:
        yield
    except RuntimeError as error:
        reason = first_line(error)
        if not isinstance(error, torch.distributed.DistError) and "gloo/transport" not in reason:
            raise
        reason = re.sub(r"^\[\S+\] ", "", reason).split(". ")[0]  # without gloo's file, line and good wishes
        raise LostRankError(
            f"another rank is gone, or did not answer within train.timeout_s={config.train.timeout_s:g} ({reason}); "
            "look for its own last words above, and run again to go on from the newest checkpoint"
        ) from error


def leave() -> None:
    """Leaves the job in order; a process group torn down by the interpreter's exit can abort the rank."""
    if deepspeed.comm.is_initialized():
        deepspeed.comm.barrier()
        deepspeed.comm.destroy_process_group()


def build(config: Config, model: nn.Module, world_size: int) -> DeepSpeedEngine:
    """The engine that trains `model` (already on its device) with the configured optimizer.

    Raises:
        ConfigError: fp16 on a device without it; a file of DeepSpeed's settings that contradicts the configuration.
    """
    accelerator = get_accelerator()
    if config.train.precision == "fp16" and not (accelerator and accelerator.is_fp16_supported()):
        raise ConfigError(
            "train.precision='fp16' is not allowed on this device, which does not compute in fp16; use bf16 or fp32"
        )
    if config.train.precision == "bf16" and accelerator and accelerator.device_name() == "cpu" and not cpu_has_bf16():
        log.warning("this processor has no bf16: it is emulated, several times slower than --train.precision fp32")
    if config.deepspeed_config:  # what it asks DeepSpeed to show
        logging.getLogger("DeepSpeed").setLevel(logging.INFO)
    # DeepSpeed broadcasts weights as bytes of contiguous memory.
    model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer_of(config.optim, model),
        config=deepspeed_settings(config, world_size, num_parameters),
        dist_init_required=False,
    )
    set_timeouts(config.train.timeout_s)
    if config.train.precision == "fp64":
        reduce_in_doubles(engine)
    if config.train.precision == "fp16" and config.train.zero_stage == 0:
        scale_the_loss(engine)
    return engine


def optimizer_of(optim: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """torch's SGD or AdamW over the parameters of `model`; without weight decay they are one group."""
    groups = parameter_groups(optim, model)
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, nesterov=optim.nesterov)


def parameter_groups(optim: OptimConfig, model: nn.Module) -> list[dict]:
    """Trainable parameters with the weight decay of each group.

    Matrices and filters decay; vectors (scales and shifts of a batch normalisation, biases, a neuron layer's learned
    time constant) only with `optim.decay_norm_and_neurons`. A group that would be empty is left out.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if optim.weight_decay == 0 or optim.decay_norm_and_neurons:
        return [{"params": parameters, "weight_decay": optim.weight_decay}]
    decaying = [p for p in parameters if p.dim() > 1]
    others = [p for p in parameters if p.dim() <= 1]
    groups = [{"params": decaying, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def scale_the_loss(engine) -> None:
    """Multiplies the loss by the loss scale before `engine.backward`.

    DeepSpeed 0.19 divides the gradient by it at every stage, but multiplies the loss only from ZeRO-1 on.
    """
    backward = engine.backward
    engine.backward = lambda loss: backward(loss * engine.optimizer.loss_scale)


def reduce_in_doubles(engine) -> None:
    """DeepSpeed 0.19 refuses gradients in fp64, and would send them in fp32."""
    accelerator = get_accelerator()
    assert accelerator is not None
    accelerator.supported_dtypes = lambda: [torch.float64]
    engine.communication_data_type = torch.float64


def normalise_as_one(neurons: NeuronState, world_size: int) -> None:
    """Lets every spiking layer's batch normalisation take its statistics over the micro-batches of all ranks."""

    def over_ranks(tensor: torch.Tensor) -> torch.Tensor:
        deepspeed.comm.all_reduce(tensor)
        return tensor

    for neuron in neurons.neurons:
        if isinstance(neuron, Neuron):
            neuron.ranks = Ranks(count=world_size, sum=over_ranks)


def loss_scale(engine) -> float | None:
    """The scale of the next fp16 loss; None in other precisions."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None
