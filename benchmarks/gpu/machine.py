"""The first step: what this machine is, and whether the others can run on it."""

import importlib.util
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks import table
from benchmarks.gpu.findings import Findings

PACKAGES = ("torch", "triton", "numpy", "deepspeed", "nvidia-dali-cuda130", "spikingjelly")


def environment(findings: Findings, device: torch.device) -> None:
    """GPU, memory, driver, CUDA and versions."""
    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    facts: dict = {"versions": versions, "processor": table.processor()}
    if device.type == "cuda":
        of = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": of.name,
            "gpu_memory_bytes": of.total_memory,
            "compute_capability": f"{of.major}.{of.minor}",
            "multiprocessors": of.multi_processor_count,
            "num_gpus": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver(),
        }
    findings.facts(**facts)
    findings.check("triton can be imported", importlib.util.find_spec("triton") is not None)
    findings.check("a tensor on the device", (torch.ones(3, device=device) * 2).sum().item() == 6)


def driver() -> str | None:
    """The driver's version; None where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
