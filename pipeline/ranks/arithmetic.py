"""How this process computes on a GPU: TF32 for fp32, and the same bits in every run.

`choose` sets torch's switches from a configuration. A run calls it on every rank, and an evaluation of its checkpoint
too, so that both compute alike. On a CPU a run gives the same bits without any of it.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.config import TrainConfig
from pipeline.errors import ConfigError, first_line

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED = (":4096:8", ":16:8")
"""Values of `WORKSPACE` with which cuBLAS gives the same bits in every run; other values share a buffer by chance."""


def choose(train: TrainConfig) -> None:
    """Sets what `train` asks for, before this process computes anything on a GPU.

    Raises:
        ConfigError: the environment holds a value of `WORKSPACE` that train.deterministic cannot keep its word with.
    """
    # Not torch's newer fp32_precision: torch 2.13 itself, as in torch.export, then raises an error at reading these.
    torch.backends.cuda.matmul.allow_tf32 = train.tf32
    torch.backends.cudnn.allow_tf32 = train.tf32
    # Else cuBLAS may add parts of a sum in fp16, which ends at 65504, or in bf16, which has 8 bits.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if train.deterministic:
        got = os.environ.setdefault(WORKSPACE, FIXED[0])  # cuBLAS reads it when it is first used
        if got not in FIXED:
            raise ConfigError(
                f"{WORKSPACE}={got!r} in the environment is not allowed with train.deterministic; use "
                f"{' or '.join(FIXED)}, or leave it unset"
            )
    torch.use_deterministic_algorithms(train.deterministic)
    torch.backends.cudnn.deterministic = train.deterministic
    torch.backends.cudnn.benchmark = False  # its choice of an algorithm follows from times, which differ in every run
    # Our kernels write all that they allocate. To fill it first costs a launch for each tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def explained() -> Iterator[None]:
    """Turns torch's error for an operation that differs in every run into a ConfigError of one line."""
    try:
        yield
    except RuntimeError as error:
        found = re.match(r"(.+?) does not have a deterministic implementation", first_line(error))
        if found is None:
            raise
        raise ConfigError(
            f"train.deterministic=True is not allowed here: {found[1]} has no form on this device that gives the same "
            "bits in every run; use train.deterministic false"
        ) from error
