"""The steps, in their order, and what each may take."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Step:
    """One step: `module.function(findings, device)` in benchmarks/gpu."""

    name: str
    module: str
    function: str
    says: str
    usual_s: float
    """It is left out where less is left of the budget, by the clock."""
    limit_s: float
    """It is ended after this time."""


STEPS = (
    Step("environment", "machine", "environment", "what the machine is", 15, 60),
    Step("kernels", "kernel_checks", "kernels", "every kernel against its definition", 90, 240),
    Step("traps", "traps", "traps", "what goes wrong on GPUs only", 20, 90),
    Step("bandwidth", "bandwidth", "bandwidth", "share of the memory bandwidth", 15, 60),
    Step("training", "training", "training", "200 steps, losses against the CPU's", 60, 150),
    Step("speed", "speed", "speed", "SEW-ResNet34's step against SpikingJelly's; χ; launches", 120, 300),
    Step("large", "kernel_checks", "large", "more than 2^31 elements", 15, 90),
)
