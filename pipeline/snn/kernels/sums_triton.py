"""The GPU twin of sums.py: nnz, Σ|g| and Σg² of all gradients of a step, in two launches.

A gradient is cut into tiles of `TILE` elements; none crosses into the next gradient. The first kernel has a program for
each tile and writes its three sums; the second has one for each gradient and adds its tiles in order. So the sums are
the same in every run, and counts are exact. Where the gradients lie, and which tile is whose, is read from tables in
device memory. They are made again, from pinned memory, only when sizes or places change.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# (Triton's types describe what a kernel sees, not what its caller passes.)
import functools
import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

TILE = 8192
"""Elements of a tile. The grid's first dimension may be 2**31 - 1: that is 1.7e13 elements."""
_BLOCK, _FOLD = 1024, 128


@triton.jit(do_not_specialize_on_alignment=["g_ptr"])
def _sum_tiles(g_ptr, offset_ptr, numel_ptr, first_ptr, owner_ptr, out_ptr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    tile = tl.program_id(0)
    owner = tl.load(owner_ptr + tile)
    numel = tl.load(numel_ptr + owner)
    gradient = g_ptr + tl.load(offset_ptr + owner)
    start = (tile - tl.load(first_ptr + owner)) * TILE  # 64 bits, as `first` is
    count = tl.zeros((BLOCK,), tl.int32)
    magnitude = tl.zeros((BLOCK,), tl.float64)
    square = tl.zeros((BLOCK,), tl.float64)
    for k in range(TILE // BLOCK):
        at = start + k * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(gradient + at, mask=at < numel, other=0.0).to(tl.float64)
        count += (value != 0).to(tl.int32)
        magnitude += tl.abs(value)
        square += value * value
    out = out_ptr + tile.to(tl.int64) * 3
    tl.store(out, tl.sum(count).to(tl.float64))
    tl.store(out + 1, tl.sum(magnitude))
    tl.store(out + 2, tl.sum(square))


@triton.jit
def _fold(tiles_ptr, first_ptr, out_ptr, BLOCK: tl.constexpr):
    owner = tl.program_id(0)
    first, end = tl.load(first_ptr + owner), tl.load(first_ptr + owner + 1)
    count = tl.zeros((BLOCK,), tl.float64)
    magnitude = tl.zeros((BLOCK,), tl.float64)
    square = tl.zeros((BLOCK,), tl.float64)
    for start in range(first, end, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        count += tl.load(tiles_ptr + tile * 3, mask=tile < end, other=0.0)
        magnitude += tl.load(tiles_ptr + tile * 3 + 1, mask=tile < end, other=0.0)
        square += tl.load(tiles_ptr + tile * 3 + 2, mask=tile < end, other=0.0)
    tl.store(out_ptr + owner * 3, tl.sum(count))
    tl.store(out_ptr + owner * 3 + 1, tl.sum(magnitude))
    tl.store(out_ptr + owner * 3 + 2, tl.sum(square))


class Tiles(NamedTuple):
    """How P gradients are cut into Q tiles; tensors on the device."""

    numel: torch.Tensor
    """`(P,)` int64."""
    first: torch.Tensor
    """`(P + 1,)` int64, the first tile of each gradient, and Q."""
    owner: torch.Tensor
    """`(Q,)` int32, whose a tile is."""


@functools.lru_cache(maxsize=64)
def tiles(numels: tuple[int, ...], device: torch.device) -> Tiles:
    """The tables for gradients of these sizes."""
    counts = [triton.cdiv(numel, TILE) for numel in numels]
    owner = torch.repeat_interleave(torch.arange(len(numels), dtype=torch.int32), torch.tensor(counts))
    first = itertools.accumulate(counts, initial=0)
    return Tiles(_copied(torch.tensor(numels), device), _copied(torch.tensor([*first]), device), _copied(owner, device))


@functools.lru_cache(maxsize=64)
def _offsets(offsets: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return _copied(torch.tensor(offsets), device)


def _copied(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`table` on the device; the host does not wait for the copy."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def run(gradients: list[torch.Tensor]) -> torch.Tensor:
    """As `sums.run_reference`, of dense gradients of one dtype: fp32, bf16 or fp16."""
    device, numels = gradients[0].device, tuple(gradient.numel() for gradient in gradients)
    base = next((gradient for gradient in gradients if gradient.numel()), None)
    if base is None:
        return torch.zeros(len(gradients), 3, dtype=torch.float64, device=device)
    # Where a gradient begins, in elements from the first one: it may lie in another allocation.
    size, origin = base.element_size(), base.data_ptr()
    offsets = tuple((g.data_ptr() - origin) // size if g.numel() else 0 for g in gradients)
    table = tiles(numels, device)
    where = _offsets(offsets, device)
    of_tiles = torch.empty(len(table.owner), 3, dtype=torch.float64, device=device)
    sums = torch.empty(len(gradients), 3, dtype=torch.float64, device=device)
    with torch.cuda.device_of(base):
        _sum_tiles[(len(table.owner),)](base, where, table.numel, table.first, table.owner, of_tiles, TILE, _BLOCK)
        _fold[(len(gradients),)](of_tiles, table.first, sums, _FOLD)
    return sums
