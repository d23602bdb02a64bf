"""A DeepSpeed engine from a `Config`: its settings, precision, loss scale and batch normalisation over ranks."""

import logging

import deepspeed
import deepspeed.comm
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from pipeline.config import Config
from pipeline.engine.deepspeed_settings import deepspeed_settings
from pipeline.engine.optimizer import optimizer_of
from pipeline.errors import ConfigError
from pipeline.ranks.cores import cpu_has_bf16
from pipeline.ranks.group import set_timeouts
from pipeline.snn.kernels.norm import Ranks
from pipeline.snn.neurons import Neuron, NeuronState

log = logging.getLogger(__name__)


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
    if config.deepspeed_config:  # so that DeepSpeed shows what the file asks for
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
    if config.train.zero_stage == 3:
        gather_after_skips(engine)
    return engine


def gather_after_skips(engine) -> None:
    """Lets ZeRO-3 gather the small parameters, which it keeps whole, after a step that it skips too.

    DeepSpeed 0.19 cuts them into partitions before each step, and gathers them only after one that made an update. Our
    layers read batch normalisations without calling them, so DeepSpeed would then fetch these in an order that differs
    from the one that it has recorded, and end the run.
    """
    step = engine.optimizer.step

    def step_and_gather(*args, **kwargs):
        step(*args, **kwargs)
        if engine.optimizer.overflow:  # the same on every rank
            engine.optimizer.checkpoint_event_epilogue()

    engine.optimizer.step = step_and_gather


def scale_the_loss(engine) -> None:
    """Multiplies the loss by the loss scale before `engine.backward`.

    DeepSpeed 0.19 divides the gradient by the scale at every stage, but multiplies the loss only from ZeRO-1 on.
    """
    backward = engine.backward
    engine.backward = lambda loss: backward(loss * engine.optimizer.loss_scale)


def reduce_in_doubles(engine) -> None:
    """Lets gradients be reduced in fp64: DeepSpeed 0.19 refuses that, and would send them in fp32."""
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
