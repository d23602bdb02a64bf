"""χ and its control for a training script of one's own: plain PyTorch, DistributedDataParallel, FSDP2."""

from pipeline.chi.attach.foreign import prepare
from pipeline.chi.attach.pilot import Pilot, attach

__all__ = ["Pilot", "attach", "prepare"]
