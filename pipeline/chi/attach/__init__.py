"""χ and its control for a training script of one's own: plain PyTorch, DistributedDataParallel, FSDP2."""

from pipeline.chi.attach.pilot import Pilot, attach
from pipeline.snn.networks.foreign import prepare

__all__ = ["Pilot", "attach", "prepare"]
