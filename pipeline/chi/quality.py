"""How good a surrogate's gradient is: how fast the true loss falls along it.

The loss of a spiking network is that of hard spikes; a surrogate's width only chooses the direction in which training
moves. For widths w, the weights W_ℓ of the spiking layers and their gradients G_ℓ(w) on one batch,

    d_ℓ = G_ℓ / |G_ℓ| · |W_ℓ|                  every layer turns by the same angle, whatever the size of its gradient
    D(w) = (L(W + ε d) - L(W - ε d)) / 2ε      L on another batch, which the gradient has not seen

D is the fall of the loss per unit of relative change of the weights; 0 where the gradient says nothing. All widths are
tried with the same batches, so their differences are far more certain than the figures themselves.

The second figure is the cosine between gradients of different batches. It rises with the width alone, since a wide
surrogate averages over more neurons: it says how noisy a gradient is, not how right.

A measurement takes one forward and backward pass and two forward passes for each width and batch. It leaves weights,
statistics, counters and widths as they were. Limits: batch normalisation uses the batches' own statistics, as in
training; only the layers' own weights move (not normalisation, classifier or time constants); D is a slope near W, not
what a whole run gains.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.chi.widths import in_training_mode
from pipeline.snn.neurons import NeuronState

EPSILON = 0.02
"""ε: short enough for a slope, long enough that many spikes change."""

Batch = tuple[Tensor, Tensor]
"""Images and labels."""


class Quality(NamedTuple):
    """What C candidates gave on B batches."""

    descent: Tensor
    """D, `(C, B)` float64, in the loss's units."""
    cosine: Tensor
    """Between the directions d of each batch and the one before it, `(C, B)` float64: all layers as one vector, each
    weighted by |W_ℓ|^2. NaN where no layer has a gradient."""


def measure(
    network: nn.Module,
    neurons: NeuronState,
    weights: Sequence[nn.Parameter],
    candidates: Tensor,
    batches: Sequence[tuple[Batch, Batch]],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    epsilon: float = EPSILON,
) -> Quality:
    """D and the cosine of every candidate.

    Args:
        network: from images to whatever `loss` takes; on the batches' device.
        neurons: its layers' widths (`snn.neurons.bind`), L of them.
        weights: the layers' weights, which move; see `SpikingLayer.weight`.
        candidates: widths to try, `(C, L)`, in units of the potential.
        batches: B pairs, at least two: the batch of the gradient, and the batch of the loss.
        loss: of the network's output and the labels; its mean over the batch.
        epsilon: ε.

    Raises:
        ValueError: the shapes do not fit; a surrogate with scale rms, whose amplitude would have to follow the width.
    """
    if candidates.dim() != 2 or candidates.shape[1] != len(neurons.names):
        raise ValueError(
            f"candidates of shape {tuple(candidates.shape)} are not allowed; use (C, {len(neurons.names)})"
        )
    if len(batches) < 2:
        raise ValueError(f"{len(batches)} pairs of batches are not allowed; use 2 or more")
    if bool(neurons.has_rms.any()):
        raise ValueError("model.scale='rms' is not allowed here: its amplitudes follow the widths only while training")
    descent = torch.empty(len(candidates), len(batches), dtype=torch.float64)
    cosine = torch.empty_like(descent)
    kept = neurons.widths.clone()
    try:
        with in_training_mode(network):
            for c, widths in enumerate(candidates):
                neurons.widths.copy_(widths)
                first = before = None
                for b, (seen, unseen) in enumerate(batches):
                    d = _direction(network, weights, seen, loss)
                    descent[c, b] = slope_along(network, weights, d, unseen, loss, epsilon)
                    if before is None:
                        first = d
                    else:
                        cosine[c, b] = _cosine(before, d)
                    before = d
                assert first is not None
                assert before is not None
                cosine[c, 0] = _cosine(before, first)
    finally:
        neurons.widths.copy_(kept)
    return Quality(descent, cosine)


def relative(descent: Tensor) -> tuple[Tensor, Tensor]:
    """D of every candidate over that of the first, minus 1, and its standard error: `(C,)` each.

    Both from the differences on the same batches; the first one's mean is taken as known. NaN where that is not above
    0 by two standard errors: then a ratio to it says nothing.
    """
    base = descent[0]
    known = base.mean() > 2 * standard_error(base)
    change = (descent - base) / torch.where(known, base.mean(), torch.nan)
    return change.mean(1), standard_error(change)


def standard_error(values: Tensor) -> Tensor:
    """Of the mean over the last dimension, from its B values."""
    return values.std(-1) / values.shape[-1] ** 0.5


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    """One pass, with the same random numbers (dropout) in all that are compared."""
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        torch.manual_seed(0)
        return network(images)


def _direction(network: nn.Module, weights: Sequence[nn.Parameter], batch: Batch, loss) -> list[Tensor]:
    """d of every layer; zeros where a layer gets no gradient."""
    images, labels = batch
    # Not `backward`: gradients and counts of a training step in progress stay as they are.
    gradients = torch.autograd.grad(loss(_logits(network, images), labels), weights, allow_unused=True)
    directions = []
    for gradient, weight in zip(gradients, weights, strict=True):
        length = torch.zeros(()) if gradient is None else gradient.norm()
        if gradient is None or length == 0:
            directions.append(torch.zeros_like(weight))
        else:
            directions.append(gradient / length * weight.detach().norm())
    return directions


@torch.no_grad()
def slope_along(
    network: nn.Module,
    weights: Sequence[nn.Parameter],
    direction: Sequence[Tensor],
    batch: Batch,
    loss: Callable[[Tensor, Tensor], Tensor],
    epsilon: float = EPSILON,
) -> float:
    """(L(W + ε d) - L(W - ε d)) / 2ε on one batch, in the network's present mode; the weights end as they were.

    Arguments as in `measure`; `direction` has the shapes of `weights`.
    """
    images, labels = batch
    kept = [weight.detach().clone() for weight in weights]
    losses = []
    try:
        for sign in (1, -1):
            for weight, start, d in zip(weights, kept, direction, strict=True):
                weight.copy_(start + sign * epsilon * d)
            losses.append(loss(_logits(network, images), labels).double().item())
    finally:
        for weight, start in zip(weights, kept, strict=True):
            weight.copy_(start)
    return (losses[0] - losses[1]) / (2 * epsilon)


def _cosine(a: list[Tensor], b: list[Tensor]) -> Tensor:
    product = sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True))
    squares = [sum(x.double().square().sum() for x in direction) for direction in (a, b)]
    return product / (squares[0] * squares[1]) ** 0.5  # pyright: ignore[reportReturnType]
