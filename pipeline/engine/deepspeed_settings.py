"""DeepSpeed's settings for a run, merged with those of a user's own JSON file.

The file may hold only settings that report on a run or speed it up. None changes what is computed, so a run goes on
exactly with the file or without. A setting that has an option here is refused, with the option's name, unless its value
is the same.
"""

import importlib.util
import json
from pathlib import Path

from pipeline.config import Config
from pipeline.errors import ConfigError, is_outage

SHOWS = frozenset(
    (
        "comet",
        "comms_logger",
        "csv_monitor",
        "dump_state",
        "flops_profiler",
        "memory_breakdown",
        "steps_per_print",
        "tensorboard",
        "wall_clock_breakdown",
        "wandb",
    )
)
SPEEDS = frozenset(  # of zero_optimization
    (
        "allgather_bucket_size",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
    )
)
_REDUCTION = "χ rides DeepSpeed's own reduction, in the form that was tested"
INSTEAD = {
    "train_batch_size": "use --data.global_batch",
    "train_micro_batch_size_per_gpu": "use --data.micro_batch",
    "gradient_accumulation_steps": "it follows from --data.global_batch, --data.micro_batch and the number of ranks",
    "gradient_clipping": "use --optim.clip",
    "optimizer": "use --optim.name and the options beside it",
    "scheduler": "use --optim.schedule and the options beside it",
    "fp16": "use --train.precision fp16",
    "bf16": "use --train.precision bf16",
    "bfloat16": "use --train.precision bf16",
    "amp": "use --train.precision",
    "torch_autocast": "use --train.precision",
    "zero_optimization.stage": "use --train.zero_stage",
    "activation_checkpointing": "use --model.checkpoint true",
    "elasticity": "stop the run and start it again on another number of ranks",
    "communication_data_type": "χ needs gradients that are reduced in fp32",
    "prescale_gradients": "χ needs gradients that are averaged after their sum",
    "gradient_predivide_factor": "χ needs gradients that are averaged after their sum",
    "zero_optimization.reduce_bucket_size": "χ needs one bucket of all gradients",
    "zero_optimization.reduce_scatter": _REDUCTION,
    "zero_optimization.overlap_comm": _REDUCTION,
    "zero_optimization.use_multi_rank_bucket_allreduce": _REDUCTION,
}
LIBRARIES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}


def deepspeed_settings(config: Config, world_size: int, num_parameters: int) -> dict:
    """The engine's settings. One fp32 bucket holds all gradients, so χ can ride its all-reduce (chi/comm_hook.py).

    Raises:
        ConfigError: the user's file cannot be read, or it contradicts one of these settings.
    """
    settings = {
        "train_batch_size": config.data.global_batch,
        "train_micro_batch_size_per_gpu": config.data.micro_batch,
        "gradient_accumulation_steps": config.accumulation(world_size),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
        "gradient_clipping": config.optim.clip,
        "zero_optimization": {
            "stage": config.train.zero_stage,
            "overlap_comm": False,
            "reduce_scatter": True,
            "use_multi_rank_bucket_allreduce": True,
            "reduce_bucket_size": num_parameters,
        },
    }
    if config.train.precision == "bf16":
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    if config.train.precision == "fp16":
        # A loss scale of 0 is a dynamic one. Autocast is not used here: its loss scale never recovers in ZeRO-1.
        settings["fp16"] = {"enabled": True, "auto_cast": True, "loss_scale": 0, "hysteresis": 1}
    if not config.deepspeed_config:
        return settings
    theirs = read(config.deepspeed_config)
    return merged(settings, theirs, config.deepspeed_config)


def read(path: str) -> dict:
    """What the user's file holds; raises ConfigError if it is not a JSON object."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        if is_outage(error):
            raise
        raise ConfigError(f"deepspeed_config={path!r} cannot be read ({error.strerror}); name a JSON file") from None
    except ValueError as error:
        raise ConfigError(f"deepspeed_config={path!r} is not JSON ({error}); mend it") from None
    if not isinstance(document, dict):
        raise ConfigError(f"deepspeed_config={path!r} is not a JSON object but {document!r:.40}; use " + '{"key": …}')
    return document


def merged(ours: dict, theirs: dict, path: str) -> dict:
    """`ours` with what `theirs` may add.

    Raises:
        ConfigError: a key of `theirs` contradicts ours, or is not known to keep the results the same.
    """
    both = dict(ours)
    for key, value in theirs.items():
        if key == "zero_optimization" and isinstance(value, dict):
            both[key] = dict(ours[key])
            for inner, setting in value.items():
                if inner in SPEEDS and setting != "auto":
                    both[key][inner] = setting
                elif inner not in SPEEDS:
                    require_same(f"{key}.{inner}", setting, ours[key].get(inner), path)
        elif key in SHOWS:
            require_library(key, value, path)
            both[key] = value
        else:
            require_same(key, value, ours.get(key), path)
    return both


def require_same(key: str, got: object, ours: object, path: str) -> None:
    """Accepts the same value as ours, "auto", or a switch that turns off what ours does not have; else ConfigError."""
    off = isinstance(got, dict) and (got.get("enabled") is False or got.get("device") == "none")
    if got in (ours, "auto") or (off and ours is None):
        return
    if isinstance(got, dict) and isinstance(ours, dict):
        for inner, setting in got.items():
            if setting not in (ours.get(inner), "auto"):
                raise refusal(f"{key}.{inner}", setting, INSTEAD.get(key), path)
        return
    raise refusal(key, got, INSTEAD.get(key), path)


def refusal(key: str, got: object, instead: str | None, path: str) -> ConfigError:
    why = instead or "it is not known to leave the run's results alone"
    return ConfigError(f"deepspeed_config={path!r}: {key}={got!r:.80} is not allowed: {why}; leave it out of the file")


def require_library(key: str, value: object, path: str) -> None:
    """Refuses a tracker whose library is absent: DeepSpeed would fail with a traceback."""
    library = LIBRARIES.get(key)
    enabled = isinstance(value, dict) and value.get("enabled") is True
    if library and enabled and importlib.util.find_spec(library) is None:
        raise ConfigError(
            f"deepspeed_config={path!r}: {key} needs {library}, which is not installed; install it, or leave {key} out"
        )
