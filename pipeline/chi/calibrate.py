"""Widths to start from: those that put a batch's coverage at the target, layer by layer."""

import torch
from torch import Tensor, nn

from pipeline.snn.neurons import NeuronState
from pipeline.snn.potential import probed

SAMPLES = 1 << 20
"""Neuron-steps of a layer that a quantile is taken over, at most."""


@torch.no_grad()
def calibrated_widths(network: nn.Module, images: Tensor, neurons: NeuronState, targets: Tensor) -> Tensor:
    """w `(L,)` fp32, the `targets[ℓ]`-quantile of |h - v_th| in layer ℓ over one forward pass of `images`.

    The network is left as it was: its batch statistics, its mode, its counters at zero.
    """
    seen: list[list[Tensor]] = [[] for _ in targets]
    kept = {name: buffer.clone() for name, buffer in network.named_buffers()}
    training = network.training
    try:
        with probed(neurons.neurons, lambda layer, u: seen[layer].append(u.abs().flatten())):
            network.train()  # a DeepSpeed engine's returns None
            network(images)
    finally:
        network.train(training)
        for name, buffer in network.named_buffers():
            buffer.copy_(kept[name])
        neurons.zero_counts()
    widths = []
    for steps, target in zip(seen, targets.tolist(), strict=True):
        distances = torch.cat(steps)
        thinned = distances[:: -(-len(distances) // SAMPLES)]
        rank = max(1, round(target * len(thinned)))
        widths.append(thinned.kthvalue(rank).values)
    return torch.stack(widths).float()
