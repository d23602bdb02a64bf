"""The steps, in their order, what each may take, and one of them in a process of its own.

`python -m benchmarks.gpu.steps JOB` runs a step; the job, as JSON, has its module and function, the file for its
findings, whether it is simulated, and the options of the command.
"""

import importlib
import json
import sys
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """One step: `function(findings, device)` in `module`."""

    name: str
    tier: int
    """1 needs torch and Triton only; 2 needs DeepSpeed and DALI too."""
    module: str
    function: str
    says: str
    usual_s: float
    """It is left out where less is left of its tier's budget, by the clock."""
    limit_s: float
    """It is ended after this time."""


STEPS = (
    Step("environment", 1, "benchmarks.gpu.machine", "environment", "what the machine is", 15, 60),
    Step("kernels", 1, "benchmarks.gpu.kernel_checks", "kernels", "every kernel against its definition", 90, 240),
    Step("traps", 1, "benchmarks.gpu.traps", "traps", "what goes wrong on GPUs only", 20, 90),
    Step("bandwidth", 1, "benchmarks.gpu.bandwidth", "bandwidth", "share of the memory bandwidth", 15, 60),
    Step("training", 1, "benchmarks.gpu.training", "training", "200 steps, losses against the CPU's", 60, 150),
    Step("large", 1, "benchmarks.gpu.kernel_checks", "large", "more than 2^31 elements", 15, 60),
    Step("speed", 1, "benchmarks.gpu.speed", "speed", "a step against SpikingJelly's; χ; launches", 120, 400),
    Step("decoding", 2, "benchmarks.gpu.launched", "decoding", "images decoded on the GPU and on the CPU", 30, 120),
    Step("flagship", 2, "benchmarks.gpu.launched", "flagship", "20 steps, killed and resumed", 180, 480),
)


def main(job: dict) -> None:
    import torch

    from benchmarks.gpu.findings import Findings

    findings = Findings(job["findings"], simulated=job["simulated"], options=job["options"])
    if job["simulated"]:
        torch.set_num_threads(2)
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
    getattr(importlib.import_module(job["module"]), job["function"])(findings, device)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
