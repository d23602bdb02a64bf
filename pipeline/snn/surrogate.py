"""Surrogate gradients: they replace the derivative of a spike in the backward pass.

A spike is `s = 1[u >= 0]`, `u = h - v_th`; its derivative is replaced by `g(u) = a * g_w(u)`, with w the width and a
the amplitude of the layer, both scalars that live in device memory. By shape, with the area normalised to 1:

    triangle    (1/w) max(0, 1 - |u|/w)            support |u| < w
    rectangle   (1/2w) 1[|u| < w]                  support |u| < w
    atan        (1/(pi w)) / (1 + (u/w)^2)         unbounded; w is the half-width at half the maximum
    sigmoid     (1/w) f(u/w) (1 - f(u/w))          unbounded; f is the logistic function

With `scale="peak"` each is divided by its value at 0. `scale="rms"` has the area-normalised shape and an amplitude that
keeps E[g^2] constant while w moves (`rms_amplitudes`). SpikingJelly's ATan(alpha) is atan with w = 2/(pi alpha),
its PiecewiseQuadratic(alpha) triangle with w = 1/alpha, its Sigmoid(alpha) sigmoid with w = 1/alpha.
"""

import math

import torch

from pipeline.config.sections import SURROGATES
from pipeline.errors import ConfigError

SHAPES = tuple(SURROGATES)
SCALES = ("area", "peak", "rms")
BOUNDED = tuple(shape for shape, bounded in SURROGATES.items() if bounded)
"""Shapes of compact support: the only ones whose coverage is defined."""
IN_KERNELS = ("triangle", "rectangle", "atan", "sigmoid")
"""Shapes that kernels/cpu.cpp and fused_triton.py know, by their number there; others run by the reference."""

_PEAK = {"triangle": 1.0, "rectangle": 0.5, "atan": 1 / math.pi, "sigmoid": 0.25}
"""Value at u = 0 of each area-normalised shape, times w."""


def check(shape: str, scale: str) -> None:
    """Raise `ConfigError` for a shape or scale that does not exist."""
    for name, got, allowed in (("surrogate", shape, SHAPES), ("scale", scale, SCALES)):
        if got not in allowed:
            raise ConfigError(f"model.{name}={got!r} is not allowed; use one of {', '.join(allowed)}")


def derivative(
    u: torch.Tensor, width: torch.Tensor, amplitude: torch.Tensor, *, shape: str, scale: str
) -> torch.Tensor:
    """`g(u)`, the surrogate derivative of a spike at distance u from the threshold.

    Args:
        u: h - v_th, any shape, fp32 or fp64.
        width: w > 0, 0-d, in units of the potential.
        amplitude: a, 0-d, dimensionless.
        shape: one of SHAPES.
        scale: one of SCALES.

    Returns:
        g, of u's shape and dtype.
    """
    inverse = 1 / width
    gain = amplitude / _PEAK[shape] if scale == "peak" else amplitude * inverse
    if shape == "triangle":
        return gain * (1 - u.abs() * inverse).clamp_min(0)
    if shape == "rectangle":
        return gain * 0.5 * (u.abs() < width).to(u.dtype)
    ratio = u * inverse
    if shape == "atan":
        return gain / math.pi / (1 + ratio * ratio)
    # f (1 - f) from the smaller exponential: 1 - f would cancel for large u, and g would not be even.
    decay = torch.exp(-ratio.abs())
    return gain * decay / ((1 + decay) * (1 + decay))


def covered(u: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """Whether each neuron-step lies in the effective domain, `|u| < w`; bool, of u's shape."""
    return u.abs() < width


def rms_amplitudes(amplitudes: torch.Tensor, mean_sq: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Amplitudes that bring E[g^2] of every layer to its target: `a * sqrt(target / E[g^2])`.

    If nothing was counted or no neuron was in the effective domain (E[g^2] = 0 or not finite), a is not changed.

    Args:
        amplitudes: a, (L,).
        mean_sq: E[g^2] as measured with these amplitudes, (L,).
        target: wanted E[g^2], (L,).

    Returns:
        New amplitudes, (L,), in the dtype of the old ones.
    """
    usable = torch.isfinite(mean_sq) & (mean_sq > 0) & torch.isfinite(target)
    factor = torch.where(usable, target / torch.where(usable, mean_sq, 1), 1).sqrt()
    return (amplitudes * factor).to(amplitudes.dtype)
