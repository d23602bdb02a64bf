"""The GPU twins of packing.py in Triton: packing, unpacking and the pooling of spikes, a launch each.

Pooling keeps the place of each maximum within its window, one byte an output. Its backward pass is a gather: a program
sums, for its pixels, the gradients of the windows whose maximum they are. Nothing is added by atomics, so the sums are
the same in every run.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false
# (Triton's types describe what a kernel sees, not what its caller passes.)
import torch
import triton
import triton.language as tl

from pipeline.snn.kernels.fused_triton import tile_of, tiles

_BLOCK = 512
"""Elements that a program packs."""


@triton.jit
def _pack(x_ptr, out_ptr, n, BITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    word = tl.zeros((BLOCK,), tl.int32)
    for k in tl.static_range(8 // BITS):
        value = tl.load(x_ptr + at + k * tl.cast(n, tl.int64), mask=inside, other=0.0).to(tl.float32)
        word = word | (value.to(tl.int32) << (BITS * k))
    tl.store(out_ptr + at, word.to(tl.uint8), mask=inside)


@triton.jit
def _unpack(packed_ptr, out_ptr, n, BITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    word = tl.load(packed_ptr + at, mask=inside, other=0).to(tl.int32)
    for k in tl.static_range(8 // BITS):
        value = ((word >> (BITS * k)) & ((1 << BITS) - 1)).to(tl.float32)
        tl.store(out_ptr + at + k * tl.cast(n, tl.int64), value.to(out_ptr.dtype.element_ty), mask=inside)


_SIZES = ["R", "H", "W", "h", "w"]
"""Arguments that take any value in one variant of a kernel."""


@triton.jit(do_not_specialize=_SIZES)
def _pool(
    x_ptr, out_ptr, place_ptr, R, C, H, W, h, w, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    r, c = tile_of(C, BLOCK_R, BLOCK_C)
    inside = (r < R)[:, None] & (c < C)[None, :]
    image, window = r // (h * w), r % (h * w)
    top, left = window // w * STRIDE - PADDING, window % w * STRIDE - PADDING
    best = tl.full((BLOCK_R, BLOCK_C), float("-inf"), tl.float32)
    place = tl.full((BLOCK_R, BLOCK_C), -1, tl.int32)
    for k in tl.static_range(KERNEL * KERNEL):
        y, x = top + k // KERNEL, left + k % KERNEL
        there = ((y >= 0) & (y < H) & (x >= 0) & (x < W))[:, None] & inside
        at = ((image * H + y) * W + x)[:, None] * C + c[None, :]
        value = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
        # As torch: of equal values the first, and a NaN wins.
        larger = there & ((value > best) | (value != value) | (place < 0))
        best = tl.where(larger, value, best)
        place = tl.where(larger, k, place)
    at = r[:, None] * C + c[None, :]
    tl.store(out_ptr + at, best.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(place_ptr + at, place.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _pool_gradient(
    grad_ptr, place_ptr, total_ptr, R, C, H, W, h, w, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    PADDING: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    r, c = tile_of(C, BLOCK_R, BLOCK_C)
    inside = (r < R)[:, None] & (c < C)[None, :]
    image, pixel = r // (H * W), r % (H * W)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for back in tl.static_range(KERNEL * KERNEL):
        k = KERNEL * KERNEL - 1 - back  # so that the windows come in the order of memory
        y, x = pixel // W + PADDING - k // KERNEL, pixel % W + PADDING - k % KERNEL
        row, column = y // STRIDE, x // STRIDE
        window = (y >= 0) & (x >= 0) & (row * STRIDE == y) & (column * STRIDE == x) & (row < h) & (column < w)
        at = ((image * h + row) * w + column)[:, None] * C + c[None, :]
        there = window[:, None] & inside
        mine = there & (tl.load(place_ptr + at, mask=there, other=255).to(tl.int32) == k)
        total += tl.load(grad_ptr + at, mask=mine, other=0.0).to(tl.float32)
    tl.store(total_ptr + r[:, None] * C + c[None, :], total.to(total_ptr.dtype.element_ty), mask=inside)


def pack(x: torch.Tensor, out: torch.Tensor, bits: int) -> None:
    """As `pack` in cpu.cpp: dense x of n 8/bits elements into n bytes."""
    with torch.cuda.device_of(x):
        _pack[(triton.cdiv(out.numel(), _BLOCK),)](x, out, out.numel(), bits, _BLOCK)


def unpack(packed: torch.Tensor, out: torch.Tensor, bits: int) -> None:
    """The inverse of `pack`, into the dense `out`."""
    with torch.cuda.device_of(packed):
        _unpack[(triton.cdiv(packed.numel(), _BLOCK),)](packed, out, packed.numel(), bits, _BLOCK)


def pool(x: torch.Tensor, kernel: int, stride: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Max-pooling of (N, C, H, W) in channels-last, and the places of the maxima.

    Returns:
        (N, C, h, w) in channels-last; and in uint8, counted along the rows of a window, whose side is at most 15.
    """
    n, c, height, width = x.shape
    h, w = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
    out, place = (_last(x, (n, c, h, w), dtype) for dtype in (x.dtype, torch.uint8))
    block_r, block_c, grid = tiles(n * h * w, c)
    with torch.cuda.device_of(x):
        _pool[grid](x, out, place, n * h * w, c, height, width, h, w, kernel, stride, padding, block_r, block_c)
    return out, place


def pool_gradient(
    grad: torch.Tensor, place: torch.Tensor, size: tuple[int, int], kernel: int, stride: int, padding: int
) -> torch.Tensor:
    """The gradient for `pool`'s x of `size` (H, W), from that for its output; both in channels-last."""
    n, c, h, w = grad.shape
    total = _last(grad, (n, c, *size), grad.dtype)
    rows = n * size[0] * size[1]
    block_r, block_c, grid = tiles(rows, c)
    with torch.cuda.device_of(grad):
        _pool_gradient[grid](grad, place, total, rows, c, *size, h, w, kernel, stride, padding, block_r, block_c)
    return total


def _last(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=torch.channels_last)
