"""What a layer's backward passes count, kept as the gradient of a small tensor.

A layer's op takes its tally's `meter` as one more input and returns the counts as the gradient for it. So autograd
itself decides what is counted: a pass that gives parameters a gradient, once, however often its forward ran. A forward
under `no_grad`, one that a checkpoint repeats, a spike that is detached, and `torch.autograd.grad` for other tensors
count nothing; accumulated micro-batches add up, as in `Parameter.grad`.
"""

import torch

COUNTED = ("neuron_steps", "spikes", "covered", "grad_sq")
"""Elements of a meter: T times the neurons in the batch; how many fired; how many had |h - v_th| < w (0 where the
surrogate has no bound); the sum of g(h - v_th)^2."""


class Tally:
    """One layer's counters, on the device of its layer."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.meter = torch.zeros(len(COUNTED), dtype=torch.float64, device=device, requires_grad=True)
        """Its gradient holds the counts, `(4,)` float64: integers are exact up to 2**53."""

    @property
    def counts(self) -> torch.Tensor:
        """`(4,)` float64, in the order of COUNTED, since `zero`."""
        return self.meter.detach() if self.meter.grad is None else self.meter.grad

    @property
    def any(self) -> bool:
        """Whether a backward pass was counted since `zero`; the device is not asked."""
        return self.meter.grad is not None

    def zero(self) -> None:
        """Forget the counts."""
        self.meter.grad = None


def meter(tally: Tally | None, *inputs: torch.Tensor | None) -> torch.Tensor | None:
    """The meter to hand to a layer's op, or None if no gradient will flow through the layer: counting starts none."""
    if tally is None or not torch.is_grad_enabled():
        return None
    return tally.meter if any(x is not None and x.requires_grad for x in inputs) else None
