"""torch's optimizer over a network's parameters: which of them decay, and by how much."""

import torch
from torch import nn

from pipeline.config import OptimConfig
from pipeline.snn.external_neurons import Steered


def optimizer_of(optim: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """torch's SGD or AdamW over the parameters of `model`; without weight decay they are one group."""
    groups = parameter_groups(optim, model)
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, nesterov=optim.nesterov)


def parameter_groups(optim: OptimConfig, model: nn.Module) -> list[dict]:
    """Trainable parameters with the weight decay of each group.

    Matrices and filters decay; vectors (scales and shifts of a batch normalisation, biases) and all that neurons learn
    beside the weights that feed them (time constants, the matrix over time of parallel spiking neurons) only with
    `optim.decay_norm_and_neurons`. A group that would be empty is left out.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if optim.weight_decay == 0 or optim.decay_norm_and_neurons:
        return [{"params": parameters, "weight_decay": optim.weight_decay}]
    of_neurons = {id(p) for module in model.modules() if _is_neuron(module) for p in module.parameters()}
    decaying = [p for p in parameters if p.dim() > 1 and id(p) not in of_neurons]
    others = [p for p in parameters if p.dim() <= 1 or id(p) in of_neurons]
    groups = [{"params": decaying, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _is_neuron(module: nn.Module) -> bool:
    """Whether a module is a layer of neurons: ours, or one that holds a surrogate and nothing else."""
    children = list(module.children())
    return isinstance(module, Steered) or (bool(children) and all(isinstance(child, Steered) for child in children))
