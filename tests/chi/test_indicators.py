"""χ and its companions against their definitions, on gradients with known zeros."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.chi.indicators import gradient_sums, indicators
from pipeline.snn.kernels import sums


def test_sums_against_a_plain_count():
    gradient = torch.tensor([[0.0, -2.0, 0.0], [1e-30, 3.0, -0.0]])
    nnz, magnitudes, squares = gradient_sums(gradient).tolist()
    assert nnz == 3
    assert magnitudes == pytest.approx(5.0)
    assert squares == pytest.approx(13.0)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=50))
def test_sums_of_any_gradient(values):
    nnz, magnitudes, squares = gradient_sums(torch.tensor(values, dtype=torch.float32)).tolist()
    assert nnz == sum(value != 0 for value in values)
    assert magnitudes == pytest.approx(math.fsum(abs(value) for value in values), rel=1e-12)
    assert squares == pytest.approx(math.fsum(value * value for value in values), rel=1e-12)


def layouts(gradient: torch.Tensor) -> list[torch.Tensor]:
    """The same elements in other memory layouts: contiguous, channels last, and with gaps."""
    if gradient.dim() != 4:
        return [gradient]
    with_gaps = torch.full((*gradient.shape[:3], 2 * gradient.shape[3]), 7.0, dtype=gradient.dtype)[..., ::2]
    return [gradient, gradient.contiguous(memory_format=torch.channels_last), with_gaps.copy_(gradient)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(0,), (1,), (31,), (2**15,), (2**15 + 1,), (100_003,), (6, 5, 3, 3)])
def test_one_pass_gives_the_sums_of_the_definition(shape, dtype):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul_(1e-3).to(dtype)
    gradient.view(-1)[::3] = 0
    gradient.view(-1)[1::97] = torch.finfo(dtype).smallest_normal / 4  # a denormal is not zero
    wide = gradient.double()
    expected = [(wide != 0).sum().item(), wide.abs().sum().item(), wide.square().sum().item()]
    for laid_out in layouts(gradient):
        for run in (sums.run, sums.run_reference):
            ((nnz, magnitudes, squares),) = run([laid_out]).tolist()
            assert nnz == expected[0]
            assert magnitudes == pytest.approx(expected[1], rel=1e-12)
            assert squares == pytest.approx(expected[2], rel=1e-12)


def test_an_overflowing_gradient_shows_in_the_sums():
    assert not torch.isfinite(gradient_sums(torch.tensor([1.0, math.nan]))).all()
    assert not torch.isfinite(gradient_sums(torch.tensor([1.0, math.inf]))).all()


def of(gradients: list[list[float]], **counts):
    tensors = [torch.tensor(g) for g in gradients]
    sums = torch.stack([gradient_sums(g) for g in tensors])
    weights = torch.tensor([g.numel() for g in tensors])
    settings = {
        "spikes": torch.zeros(len(tensors), dtype=torch.int64),
        "covered": None,
        "neuron_steps": torch.full((len(tensors),), 8),
    }
    return indicators(sums, sums[:, 0].sum(), weights=weights, parameters=int(weights.sum()), **(settings | counts))


def test_chi_and_participation_by_their_definitions():
    result = of([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 5.0], [2.0, 2.0, -2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert result.chi.tolist() == [0.5, 0.25, 1.0, 0.0]
    assert result.participation.tolist() == pytest.approx([0.5, 0.25, 1.0, 0.0])
    assert result.grad_norm.tolist() == pytest.approx([math.sqrt(2), 5.0, 4.0, 0.0])
    assert result.network_chi.item() == 7 / 16


def test_participation_sees_inequality_where_chi_does_not():
    equal, unequal = of([[1.0] * 4, [100.0, 1e-6, 1e-6, 1e-6]]).participation.tolist()
    assert equal == pytest.approx(1.0)
    assert unequal == pytest.approx(0.25, rel=1e-6)


def test_rates_are_fractions_of_neuron_steps():
    result = of([[1.0], [1.0]], spikes=torch.tensor([2, 8]), covered=torch.tensor([4, 0]))
    assert result.firing_rate.tolist() == [0.25, 1.0]
    assert result.coverage.tolist() == [0.5, 0.0]


def test_coverage_is_absent_for_unbounded_support():
    assert of([[1.0]]).coverage.isnan().all()
