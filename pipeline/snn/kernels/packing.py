"""Packs the input that a convolution keeps for its backward pass: 1 bit a spike, 4 bits a sum of spikes. Lossless.

It also recomputes a convolution's output (`Again`) and pools spikes in little memory.

Byte j of the packed form of n elements at b bits holds elements j, j + n b/8, j + 2 n b/8, ...: planes, not
neighbours, so packing and unpacking are vector operations on whole planes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

from pipeline.snn.kernels import compiled, dispatch

_POOL_IMAGES = 4
"""Images that `max_pool2d` pools at a time."""


def bits_for(largest: int) -> int:
    """Bits that hold the integers 0 to `largest`: 1, 4 or 8; 0 if they need more."""
    return 1 if largest <= 1 else 4 if largest <= 15 else 8 if largest <= 255 else 0


def pack(x: torch.Tensor, bits: int) -> torch.Tensor | None:
    """Packs integers 0 to 2^bits - 1 of any dtype into a flat uint8 tensor; None if they do not fill whole bytes.

    x must be dense; the order is that of its elements in memory. Values outside the range are not detected: the
    structure of the network bounds them.
    """
    per_byte = 8 // bits if bits else 0
    if not per_byte or not x.numel() or x.numel() % per_byte or not _dense(x):
        return None
    n = x.numel() // per_byte
    kernels = compiled.library(x)
    if kernels is not None:
        out = torch.empty(n, dtype=torch.uint8)
        kernels.pack(x.data_ptr(), out.data_ptr(), n, bits, torch.get_num_threads())
        return out
    gpu = _gpu_kernels(x)
    if gpu is not None:
        out = torch.empty(n, dtype=torch.uint8, device=x.device)
        gpu.pack(x, out, bits)
        return out
    planes = x.detach().as_strided((per_byte, n), (n, 1)).to(torch.int32)
    shifts = torch.arange(per_byte, device=x.device, dtype=torch.int32)[:, None] * bits
    return (planes << shifts).sum(0).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int, like: torch.Tensor) -> torch.Tensor:
    """The inverse: a new tensor with the shape, strides and dtype of `like` (which may be on the meta device)."""
    out = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=packed.device)
    n = packed.numel()
    kernels = compiled.library(out)
    if kernels is not None:
        kernels.unpack(packed.data_ptr(), out.data_ptr(), n, bits, torch.get_num_threads())
        return out
    gpu = _gpu_kernels(out)
    if gpu is not None:
        gpu.unpack(packed, out, bits)
        return out
    shifts = torch.arange(8 // bits, device=packed.device, dtype=torch.int32)[:, None] * bits
    out.as_strided((8 // bits, n), (n, 1)).copy_((packed.to(torch.int32) >> shifts) & ((1 << bits) - 1))
    return out


def _gpu_kernels(x: torch.Tensor):
    """The Triton module for a tensor on a GPU, or None."""
    if dispatch.gpu_kernels(x) is None:
        return None
    from pipeline.snn.kernels import packing_triton  # not at the top: Triton may be absent

    return packing_triton


def _dense(x: torch.Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


class Packed:
    """A tensor of small integers in packed form, with what `unpack` needs to restore it."""

    __slots__ = ("bits", "data", "meta")

    def __init__(self, x: torch.Tensor, bits: int) -> None:
        self.bits = bits
        self.data = pack(x, bits)
        self.meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    def unpack(self) -> torch.Tensor:
        assert self.data is not None
        return unpack(self.data, self.bits, self.meta)


def conv2d(x: torch.Tensor, packed: Packed | None, conv: torch.nn.Conv2d) -> torch.Tensor:
    """`conv(x)`; for the backward pass it keeps `packed` instead of x, unless that is None."""
    if packed is None or packed.data is None or not torch.is_grad_enabled():
        return conv(x)
    address = x.data_ptr()

    def keep(tensor: torch.Tensor) -> torch.Tensor | Packed:
        like = packed.meta
        same = tensor.data_ptr() == address and tensor.shape == like.shape and tensor.dtype == like.dtype
        return packed if same else tensor

    def restore(kept: torch.Tensor | Packed) -> torch.Tensor:
        return kept.unpack() if isinstance(kept, Packed) else kept

    with torch.autograd.graph.saved_tensors_hooks(keep, restore):
        return conv(x)


class Again(NamedTuple):
    """How to recompute a tensor that is not kept."""

    source: torch.Tensor
    """What is kept instead of the tensor."""
    make: Callable[[torch.Tensor], torch.Tensor]
    """Computes the tensor from the source: the same bits, without a graph. It holds no tensor itself, so that nothing
    outlives the saved source."""


def convolve_again(x: torch.Tensor, packed: Packed | None, conv: torch.nn.Conv2d) -> Again:
    """Recomputes the output of `conv2d(x, packed, conv)` from what that call keeps anyway for its own gradient.

    After a change of the weights the output would differ: `make` then raises RuntimeError.
    """
    source, bits, meta = x.detach(), 0, None
    if packed is not None and packed.data is not None:
        source, bits, meta = packed.data, packed.bits, packed.meta
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    version = conv.weight._version

    def make(source: torch.Tensor) -> torch.Tensor:
        if conv.weight._version != version:
            raise RuntimeError(
                "a convolution's weights changed between the forward and the backward pass, so its output cannot be "
                "computed again; step the optimizer after the backward pass, or set model.checkpoint to false"
            )
        inputs = source if meta is None else unpack(source, bits, meta)
        bias = None if conv.bias is None else conv.bias.to(dtype)
        with torch.no_grad(), torch.autocast(device, enabled=False):
            # Not conv(...): its hooks must not run a second time.
            return conv._conv_forward(inputs.to(dtype), conv.weight.to(dtype), bias)

    return Again(source, make)


def kept_as(tensor: torch.Tensor, again: Again) -> torch.autograd.graph.saved_tensors_hooks:
    """A context in which operations keep the source of `again`, which recomputes `tensor`, instead of `tensor`."""
    address, shape = tensor.data_ptr(), tensor.shape

    def keep(kept: torch.Tensor) -> torch.Tensor | Again:
        return again if kept.data_ptr() == address and kept.shape == shape else kept

    def restore(kept: torch.Tensor | Again) -> torch.Tensor:
        return kept.make(kept.source) if isinstance(kept, Again) else kept

    return torch.autograd.graph.saved_tensors_hooks(keep, restore)


class _SpikePool(torch.autograd.Function):
    """Max-pooling that keeps the place of each maximum in 8 bits on a GPU, elsewhere in 16.

    Elsewhere it takes few images at a time: torch's places take 64 bits.
    """

    @staticmethod
    def forward(ctx, x, kernel: int, stride: int, padding: int):
        ctx.shape, ctx.window, ctx.gpu = x.shape, (kernel, stride, padding), _gpu_kernels(x)
        if ctx.gpu is not None:
            out, place = ctx.gpu.pool(x.contiguous(memory_format=torch.channels_last), *ctx.window)
            ctx.save_for_backward(place)
            return out
        dtype = torch.int16 if x.shape[2] * x.shape[3] < 2**15 else torch.int32
        outs, places = [], []
        for part in x.split(_POOL_IMAGES):
            out, place = functional.max_pool2d(part, *ctx.window, return_indices=True)
            outs.append(out)
            places.append(place.to(dtype))
        ctx.save_for_backward(*places)
        return torch.cat(outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        n, c, h, w = ctx.shape
        if ctx.gpu is not None:
            grad = grad.contiguous(memory_format=torch.channels_last)
            return ctx.gpu.pool_gradient(grad, *ctx.saved_tensors, (h, w), *ctx.window), None, None, None
        total = grad.new_empty((n, h, w, c)).permute(0, 3, 1, 2)
        parts = zip(total.split(_POOL_IMAGES), grad.split(_POOL_IMAGES), ctx.saved_tensors, strict=True)
        for out, part, place in parts:
            if torch.are_deterministic_algorithms_enabled():
                out.copy_(_spread(part, place, (h, w), *ctx.window))
                continue
            # Only shape and layout of the input are read.
            like = torch.empty_like(out)
            out.copy_(
                torch.ops.aten.max_pool2d_with_indices_backward(
                    part, like, *[[size] * 2 for size in ctx.window], [1, 1], False, place.long()
                )
            )
        return total, None, None, None


def _spread(grad, place, size: tuple[int, int], kernel: int, stride: int, padding: int) -> torch.Tensor:
    """The pooling's backward pass without atomics, which on a GPU add in another order in every run.

    For each of the kernel's places, the gradients of the windows whose maximum lies there are added to its pixels, of
    which no two windows share one.
    """
    (h, w), (rows, columns) = size, grad.shape[2:]
    total = grad.new_zeros((*grad.shape[:2], h + 2 * padding, w + 2 * padding))
    top, left = (torch.arange(n, device=grad.device) * stride - padding for n in (rows, columns))
    for i in range(kernel):
        for j in range(kernel):
            y, x = (top + i)[:, None], (left + j)[None]
            here = (place == y * w + x) & (y >= 0) & (y < h) & (x >= 0) & (x < w)
            total[:, :, i::stride, j::stride][:, :, :rows, :columns] += torch.where(here, grad, 0)
    return total[:, :, padding : padding + h, padding : padding + w]


def max_pool2d(x: torch.Tensor, pool: torch.nn.Module) -> torch.Tensor:
    """`pool(x)`. It keeps 1 or 2 bytes an output; a plain pooling keeps the spikes and 8 bytes an output."""
    if not isinstance(pool, torch.nn.MaxPool2d) or not torch.is_grad_enabled() or not x.numel():
        return pool(x)
    return _SpikePool.apply(x, pool.kernel_size, pool.stride, pool.padding)
