"""Losses: from the logits of every time step to a scalar."""

import torch
from torch.nn import functional

from pipeline.config import TrainConfig


def loss(train: TrainConfig, logits_TNK: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of one micro-batch, as `train` configures it; a scalar. `targets` as in `cross_entropy`."""
    if train.loss == "tet":
        return tet(logits_TNK, targets, lam=train.tet_lambda, smoothing=train.label_smoothing)
    return cross_entropy(logits_TNK, targets, smoothing=train.label_smoothing)


def cross_entropy(logits_TNK: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy of the mean over time, `CE(mean_t o_t, y)`, averaged over the batch.

    Args:
        logits_TNK: o, (T, N, K), any floating dtype; summed in fp32 (fp64 for fp64).
        targets: class numbers y, (N,) int64; or of mixed images the classes' shares p, (N, K) floating, that sum to 1.
            The loss is linear in p: of two classes it is λ CE(o, y1) + (1 - λ) CE(o, y2).
        smoothing: the share ε of the target that is spread over all K classes, `(1 - ε) p_k + ε / K`, where a class
            number is p_k = 1[k = y]; in [0, 1).

    Returns:
        A scalar in fp32 (fp64 for fp64).
    """
    return functional.cross_entropy(_widened(logits_TNK).mean(0), targets, label_smoothing=smoothing)


def tet(
    logits_TNK: torch.Tensor, targets: torch.Tensor, lam: float = 1e-3, mean: float = 1.0, smoothing: float = 0.0
) -> torch.Tensor:
    """Temporal efficient training: `(1 - lam) mean_t CE(o_t, y) + lam MSE(o, mean)`.

    Every time step has to classify by itself; the second term pulls all logits to the constant `mean`.
    Source: Deng et al., "Temporal Efficient Training of Spiking Neural Network via Gradient Re-weighting", ICLR 2022.

    Args:
        logits_TNK: o, (T, N, K).
        targets: as in `cross_entropy`.
        lam: weight of the second term, in [0, 1].
        mean: the constant that logits are pulled to.
        smoothing: of the targets, as in `cross_entropy`.

    Returns:
        A scalar in fp32 (fp64 for fp64).

    Raises:
        ValueError: lam is outside [0, 1].
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"tet: lam={lam} is not allowed; use a number in [0, 1]")
    logits = _widened(logits_TNK)
    T = logits.shape[0]
    # Equal batch sizes at every step: the mean over (T, N) is the mean over t of the mean over N.
    every_step = targets.repeat(T, *(1 for _ in targets.shape[1:]))
    step_ce = functional.cross_entropy(logits.flatten(0, 1), every_step, label_smoothing=smoothing)
    return (1 - lam) * step_ce + lam * (logits - mean).square().mean()


def _widened(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
