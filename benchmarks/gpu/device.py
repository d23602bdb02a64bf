"""The device of a check, and the CPU in its place: there the GPU kernels run in Triton's interpreter."""

import torch

from pipeline.snn.kernels import compiled, dispatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpret() -> None:
    """Sends the spiking layers on the CPU through the Triton kernels, in this process, as on a GPU.

    Triton must have been imported with TRITON_INTERPRET=1.
    """
    from pipeline.snn.kernels import fused_triton

    dispatch.choose = lambda x, rule: fused_triton.Call if x.numel() else None  # pyright: ignore
    dispatch.gpu_kernels = lambda x: fused_triton if x.dtype in DTYPES else None
    compiled.library = lambda *_: None  # pyright: ignore


def synchronise(device: torch.device) -> None:
    """Waits for all work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
