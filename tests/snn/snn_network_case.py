"""One forward and backward pass of a network in fp64; weights and images depend only on names."""

import hashlib
import zlib

import torch
from torch import nn

T, N, K, SIZE = 4, 2, 10, 64


def numbers(name: str, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """Standard normal numbers that depend on `name` and `shape` only."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


def fill(network: nn.Module) -> None:
    """Weights from their names: Kaiming fan-out for convolutions, BN near gamma 1 and beta 0.3 so that layers fire."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            value = numbers(name, parameter.shape)
            if parameter.dim() == 4:
                value *= (2 / (parameter.shape[0] * parameter.shape[2] * parameter.shape[3])) ** 0.5
            elif parameter.dim() == 2:
                value *= 0.05
            else:
                value = value * 0.1 + (1.0 if name.endswith("weight") else 0.3)
            parameter.copy_(value)


def run(network: nn.Module, neurons: list[nn.Module], static: bool) -> dict:
    """Logits, loss, spikes of each neuron layer (T, N, C, H, W) and every gradient.

    `neurons` are modules whose output is a layer's spikes; `static`: the network takes images and returns (T, N, K).
    """
    spikes = []
    handles = [module.register_forward_hook(lambda _m, _i, out: spikes.append(out)) for module in neurons]
    images, labels = numbers("images", (N, 3, SIZE, SIZE)), torch.arange(N)
    logits = network(images if static else images[None].repeat(T, 1, 1, 1, 1))
    loss = nn.functional.cross_entropy(logits.mean(0), labels)
    loss.backward()
    for handle in handles:
        handle.remove()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return {"logits": logits.detach(), "loss": loss.item(), "spikes": spikes, "gradients": gradients}


def digest(result: dict) -> dict:
    """A small summary that changes if one spike changes: a hash of each layer's spikes; of each gradient its norm and
    its product with fixed random numbers."""
    layers = []
    for s in result["spikes"]:
        bits = s.detach().reshape(T, N, *s.shape[-3:]).contiguous().to(torch.uint8)
        layers.append(hashlib.sha256(bits.numpy().tobytes()).hexdigest()[:16])
    gradients = {
        name: [g.norm().item(), (g * numbers("probe " + name, g.shape)).sum().item()]
        for name, g in result["gradients"].items()
    }
    logits = result["logits"].flatten().tolist()
    return {"logits": logits, "loss": result["loss"], "spikes": layers, "gradients": gradients}
