"""One pass over all gradients by the GPU kernels, in Triton's interpreter on the CPU; test_sums.py runs this file.

TRITON_INTERPRET=1 CHISPIKE_TEST_INTERPRETER=1 python -m pytest tests/snn/snn_sums_cases.py
"""

import mmap

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.snn.kernels import sums, sums_triton
from pipeline.snn.kernels.sums_triton import TILE, _sum_tiles
from tests.support.snn_twins import poison

SIZES = [0, 1, 64, TILE - 1, TILE, TILE + 1, 0, 3 * TILE + 5, 7, 0]


def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
    """Views of one flat tensor, as in a bucket: most begin inside what would be a tile of the whole."""
    flat = torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(3)).to(dtype)
    flat[::3] = 0
    flat[1] = -0.0
    return list(flat.split(SIZES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernels_give_the_reference_sums_of_each_gradient(dtype, monkeypatch):
    parts = gradients(dtype)
    expected = sums.run_reference(parts)
    poison(monkeypatch)
    ours = sums.run(parts)
    assert ours[:, 0].tolist() == expected[:, 0].tolist()
    # Σg² of the definition is a squared root.
    torch.testing.assert_close(ours, expected, rtol=1e-14, atol=0)
    # Other places in memory, in whatever order, and as a view of one that has an odd address: the same bits.
    apart = [torch.cat((part[:0], part)) for part in reversed(parts)]
    assert torch.equal(sums.run(apart).flip(0), ours)
    odd = torch.cat((parts[0].new_ones(1), *parts))[1:]
    assert torch.equal(sums.run(list(odd.split(SIZES))), ours)
    one_by_one = torch.stack([sums.run([part])[0] for part in parts])
    assert torch.equal(one_by_one, ours)


def test_what_is_not_finite_shows_in_its_own_sums_alone():
    parts = gradients(torch.float32)
    parts[3][5], parts[7][-1] = float("nan"), float("inf")
    finite = sums.run(parts).isfinite().all(1)
    assert [row for row, ok in enumerate(finite.tolist()) if not ok] == [3, 7]


def test_gradients_of_several_dtypes_and_layouts():
    parts = [torch.randn(4, 6, 3, 3), torch.randn(5).double(), torch.randn(8, 6).bfloat16(), torch.randn(300)[::3]]
    parts[0] = parts[0].to(memory_format=torch.channels_last)
    torch.testing.assert_close(sums.run(parts), sums.run_reference(parts), rtol=1e-14, atol=0)


def test_only_empty_gradients():
    assert sums.run([torch.zeros(0), torch.zeros(0)]).tolist() == [[0, 0, 0]] * 2


class Launches:
    """In a kernel's place: keeps the grids of its launches, and runs nothing."""

    def __init__(self) -> None:
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *_: None


class Ops(TorchDispatchMode):
    """Counts torch's calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_there_are_two_launches_for_any_number_of_gradients(monkeypatch):
    parts = [torch.randn(9) for _ in range(110)]  # as many parameters as SEW-ResNet34
    tiles, fold = Launches(), Launches()
    monkeypatch.setattr(sums_triton, "_sum_tiles", tiles)
    monkeypatch.setattr(sums_triton, "_fold", fold)
    sums.run(parts)  # makes the tables
    with Ops() as ops:
        sums.run(parts)
    assert tiles.grids == fold.grids == [(110,)] * 2
    assert [name for name in ops.names if not name.startswith("empty")] == []


def test_the_grid_and_the_places_of_large_gradients():
    whole = 2**40
    table = sums_triton.tiles((5, TILE * 1000 + 1, 0), torch.device("cpu"))
    assert table.first.tolist() == [0, 1, 1002, 1002]
    assert table.owner.tolist() == [0, *[1] * 1001]
    assert whole // TILE < 2**31 - 1  # the limit of CUDA for a grid's first dimension


def test_more_than_2_31_elements_are_reached():
    n = 2**31 + 100
    memory = mmap.mmap(
        -1, 2 * n, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    )  # MAP_NORESERVE: no page is used
    whole = torch.frombuffer(memory, dtype=torch.bfloat16)
    whole[-100:] = 2
    # By an offset from the first gradient: the second one lies more than 2^31 elements behind it.
    assert sums.run([whole[:7], whole[-50:]]).tolist() == [[0, 0, 0], [50, 100, 200]]
    # By the tile: a single program, for the tile at 2^31 of a gradient that is as large.
    first = torch.tensor([-(2**31 // TILE), 1])
    zero, out = torch.zeros(1, dtype=torch.int64), torch.zeros(3, dtype=torch.float64)
    _sum_tiles[(1,)](whole, zero, torch.tensor([n]), first, zero.int(), out, TILE, 1024)  # pyright: ignore[reportArgumentType]
    assert out.tolist() == [100, 200, 400]
