"""The GPU twin in Triton: BN's application, T steps of neurons and the shortcut in one pass, and its backward pass.

A tensor is (T, R, C): R positions of C channels, channels-last. A program holds a tile of positions and channels, with
the potentials of all T steps in fp32 registers; the backward pass recomputes them from the convolution's output.
Width, amplitude and leak are read from device memory: they can change without a recompile or a host synchronisation,
and the launches can be captured in a CUDA graph. Equations: reference.py, compiled.py, norm.py.
Each launch is under `torch.cuda.device_of`: Triton takes the thread's current GPU, which need not be the tensors'.

Counts and sums have one partial sum for each program: they are the same in every run. Without a GPU the kernels run in
Triton's interpreter (TRITON_INTERPRET=1, set before this is imported).
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportGeneralTypeIssues=false
# (Triton's types describe what a kernel sees, not what its caller passes.)
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pipeline.snn import surrogate
from pipeline.snn.kernels.reference import Rule
from pipeline.snn.kernels.tally import COUNTED

_TILE = 512
"""Elements of a tile."""


def tiles(rows: int, channels: int, widest: int = 64, elements: int = _TILE) -> tuple[int, int, tuple[int]]:
    """Rows and channels of a tile, and the grid of tiles over (rows, channels), neighbours in memory first.

    The grid has one dimension: CUDA allows 2^31 - 1 blocks in the first, and 65,535 in the others.
    """
    block_c = min(triton.next_power_of_2(channels), widest)
    block_r = max(1, elements // block_c)
    return block_r, block_c, (triton.cdiv(rows, block_r) * triton.cdiv(channels, block_c),)


_SCALARS = ("width_ptr", "amplitude_ptr", "leak_ptr", "partial_ptr", "sum_ptr", "product_ptr")
"""Pointers that may be views of a vector or of a buffer: one variant of a kernel serves every alignment of them."""


@triton.jit
def tile_of(C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows and channels of this program's tile, in 64 bits: T R C passes 2^31 at batch 670 in ImageNet's stem."""
    program = tl.program_id(0)
    across = tl.cdiv(C, BLOCK_C)
    r = (program // across).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = (program % across).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    return r, c


@triton.jit
def _surrogate(u, width, amplitude, SHAPE: tl.constexpr, PEAK: tl.constexpr):
    inverse = 1.0 / width
    if SHAPE == 0:
        gain = amplitude if PEAK else amplitude * inverse
        g = gain * tl.maximum(1.0 - tl.abs(u) * inverse, 0.0)
    elif SHAPE == 1:
        gain = amplitude / 0.5 if PEAK else amplitude * inverse
        g = gain * tl.where(tl.abs(u) < width, 0.5, 0.0)
    elif SHAPE == 2:
        gain = amplitude * 3.141592653589793 if PEAK else amplitude * inverse
        ratio = u * inverse
        g = gain / 3.141592653589793 / (1.0 + ratio * ratio)
    else:
        gain = amplitude / 0.25 if PEAK else amplitude * inverse
        decay = tl.exp(-tl.abs(u * inverse))
        g = gain * decay / ((1.0 + decay) * (1.0 + decay))
    return g


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=["leak_ptr"])
def _forward(
    x_ptr, scale_ptr, shift_ptr, shortcut_ptr, v_ptr, out_ptr, state_ptr, leak_ptr, v_th, v_reset, R, C,
    T: tl.constexpr, STATIC: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, LEAKY: tl.constexpr,
    HARD: tl.constexpr, FROM_STATE: tl.constexpr, TO_STATE: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    r, c = tile_of(C, BLOCK_R, BLOCK_C)
    inside = (r < R)[:, None] & (c < C)[None, :]
    at = r[:, None] * C + c[None, :]
    step = tl.cast(R, tl.int64) * C
    if NORM:
        scale = tl.load(scale_ptr + c, mask=c < C, other=0.0)[None, :]
        shift = tl.load(shift_ptr + c, mask=c < C, other=0.0)[None, :]
    if LEAKY:
        leak = tl.load(leak_ptr).to(tl.float32)
    if FROM_STATE:
        v = tl.load(v_ptr + at, mask=inside, other=0.0)
    else:
        v = tl.zeros((BLOCK_R, BLOCK_C), tl.float32) + v_reset
    for t in tl.static_range(T):
        x = tl.load(x_ptr + at + (0 if STATIC else t) * step, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            x = x * scale + shift
        h = v + (x - (v - v_reset)) * leak if LEAKY else v + x
        s = (h - v_th >= 0.0).to(tl.float32)
        v = h * (1.0 - s) + v_reset * s if HARD else h - v_th * s
        if ADD:
            s += tl.load(shortcut_ptr + at + t * step, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at + t * step, s.to(out_ptr.dtype.element_ty), mask=inside)
    if TO_STATE:
        tl.store(state_ptr + at, v, mask=inside)


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=list(_SCALARS))
def _backward(
    x_ptr, scale_ptr, shift_ptr, mean_ptr, grad_s_ptr, grad_last_ptr, v_ptr, grad_x_ptr, grad_first_ptr, partial_ptr,
    sum_ptr, product_ptr, leak_ptr, width_ptr, amplitude_ptr, v_th, v_reset, R, C,
    T: tl.constexpr, STATIC: tl.constexpr, NORM: tl.constexpr, LEAKY: tl.constexpr, HARD: tl.constexpr,
    DETACH: tl.constexpr, SHAPE: tl.constexpr, PEAK: tl.constexpr, FROM_STATE: tl.constexpr, TO_STATE: tl.constexpr,
    COUNT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    r, c = tile_of(C, BLOCK_R, BLOCK_C)
    inside = (r < R)[:, None] & (c < C)[None, :]
    at = r[:, None] * C + c[None, :]
    step = tl.cast(R, tl.int64) * C
    width, amplitude = tl.load(width_ptr).to(tl.float32), tl.load(amplitude_ptr).to(tl.float32)
    if NORM:
        scale = tl.load(scale_ptr + c, mask=c < C, other=0.0)[None, :]
        shift = tl.load(shift_ptr + c, mask=c < C, other=0.0)[None, :]
        mean = tl.load(mean_ptr + c, mask=c < C, other=0.0)[None, :]
    if LEAKY:
        leak = tl.load(leak_ptr).to(tl.float32)
    zero = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    v = tl.load(v_ptr + at, mask=inside, other=0.0) if FROM_STATE else zero + v_reset
    potentials = ()
    drives = ()
    for t in tl.static_range(T):
        x = tl.load(x_ptr + at + (0 if STATIC else t) * step, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            x = x * scale + shift
        drive = x - (v - v_reset)
        h = v + drive * leak if LEAKY else v + x
        s = (h - v_th >= 0.0).to(tl.float32)
        v = h * (1.0 - s) + v_reset * s if HARD else h - v_th * s
        potentials = potentials + (h,)  # noqa: RUF005 (Triton has no unpacking)
        drives = drives + (drive,)  # noqa: RUF005
    grad_v = tl.load(grad_last_ptr + at, mask=inside, other=0.0) if TO_STATE else zero
    square, total, product, grad_leak, spikes, covered = zero, zero, zero, zero, zero, zero
    for back in tl.static_range(T):
        h = potentials[T - 1 - back]
        u = h - v_th
        g = tl.where(inside, _surrogate(u, width, amplitude, SHAPE, PEAK), 0.0)
        s = (u >= 0.0).to(tl.float32)
        if HARD:
            keep = 1.0 - s if DETACH else 1.0 - s + (v_reset - h) * g
        else:
            keep = zero + 1.0 if DETACH else 1.0 - v_th * g
        place = at + (T - 1 - back) * step
        grad_h = tl.load(grad_s_ptr + place, mask=inside, other=0.0).to(tl.float32) * g + grad_v * keep
        square += g * g
        spikes += tl.where(inside, s, 0.0)
        if SHAPE <= 1:
            covered += ((tl.abs(u) < width) & inside).to(tl.float32)
        if LEAKY:
            grad_leak += tl.where(inside, grad_h * drives[T - 1 - back], 0.0)
            grad_x = grad_h * leak
            grad_v = grad_h * (1.0 - leak)
        else:
            grad_x = grad_h
            grad_v = grad_h
        total += grad_x
        if NORM:
            y = tl.load(x_ptr + (at if STATIC else place), mask=inside, other=0.0).to(tl.float32)
            product += tl.where(inside, grad_x * (y - mean), 0.0)
        if not STATIC:
            tl.store(grad_x_ptr + place, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if STATIC:
        tl.store(grad_x_ptr + at, total.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if FROM_STATE:
        tl.store(grad_first_ptr + at, grad_v, mask=inside)
    program = tl.program_id(0).to(tl.int64)
    if NORM:
        row = (program // tl.cdiv(C, BLOCK_C)) * C
        tl.store(sum_ptr + row + c, tl.sum(tl.where(inside, total, 0.0), 0), mask=c < C)
        tl.store(product_ptr + row + c, tl.sum(product, 0), mask=c < C)
    # Row by row: the counts in the order of tally.py, exact in fp32 for one tile, and the gradient of leak.
    programs = tl.cast(tl.num_programs(0), tl.int64)
    if COUNT:
        tl.store(partial_ptr + program, tl.sum(inside.to(tl.float32)) * T)
        tl.store(partial_ptr + programs + program, tl.sum(spikes))
        tl.store(partial_ptr + 2 * programs + program, tl.sum(covered))
        tl.store(partial_ptr + 3 * programs + program, tl.sum(square))
    if LEAKY:
        tl.store(partial_ptr + 4 * programs + program, tl.sum(grad_leak))


@triton.jit(do_not_specialize=["R"])
def _affine(
    y_ptr, grad_ptr, a_ptr, b_ptr, d_ptr, R, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    r, c = tile_of(C, BLOCK_R, BLOCK_C)
    inside = (r < R)[:, None] & (c < C)[None, :]
    at = r[:, None] * C + c[None, :]
    a = tl.load(a_ptr + c, mask=c < C, other=0.0)[None, :]
    b = tl.load(b_ptr + c, mask=c < C, other=0.0)[None, :]
    d = tl.load(d_ptr + c, mask=c < C, other=0.0)[None, :]
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_ptr + at, (grad * a + y * b + d).to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["eps", "momentum", "unbias"])
def _scales(
    mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, running_mean_ptr, running_var_ptr, batches_ptr, out_ptr,
    eps, momentum, unbias, C, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < C
    mean = tl.load(mean_ptr + c, mask=inside, other=0.0)
    exact = tl.load(rstd_ptr + c, mask=inside, other=1.0)
    # An inverse deviation of 0 stands for a variance of 0: torch gives it where all values of a channel are equal.
    var = tl.where(exact > 0.0, tl.div_rn(1.0, exact * exact), 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    scale = tl.load(gamma_ptr + c, mask=inside, other=0.0) * rstd
    shift = tl.load(beta_ptr + c, mask=inside, other=0.0) - mean * scale
    tl.store(out_ptr + c, rstd, mask=inside)
    tl.store(out_ptr + C + c, scale, mask=inside)
    tl.store(out_ptr + 2 * C + c, shift, mask=inside)
    old_mean = tl.load(running_mean_ptr + c, mask=inside, other=0.0).to(tl.float32)
    old_var = tl.load(running_var_ptr + c, mask=inside, other=0.0).to(tl.float32)
    new_mean = old_mean + (mean - old_mean) * momentum
    new_var = old_var + (var * unbias - old_var) * momentum
    tl.store(running_mean_ptr + c, new_mean.to(running_mean_ptr.dtype.element_ty), mask=inside)
    tl.store(running_var_ptr + c, new_var.to(running_var_ptr.dtype.element_ty), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(batches_ptr, tl.load(batches_ptr) + 1)


@triton.jit(do_not_specialize=["count"])
def _norm_gradients(sum_ptr, joint_ptr, mean_ptr, rstd_ptr, scale_ptr, out_ptr, count, C, BLOCK: tl.constexpr):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < C
    mean = tl.load(mean_ptr + c, mask=inside, other=0.0).to(tl.float64)
    rstd = tl.load(rstd_ptr + c, mask=inside, other=0.0).to(tl.float64)
    scale = tl.load(scale_ptr + c, mask=inside, other=0.0).to(tl.float64)
    n = tl.cast(count, tl.float64)
    b = -scale * (rstd * rstd) * tl.load(joint_ptr + C + c, mask=inside, other=0.0) / n
    d = -scale * tl.load(joint_ptr + c, mask=inside, other=0.0) / n - b * mean
    tl.store(out_ptr + c, (tl.load(sum_ptr + C + c, mask=inside, other=0.0) * rstd).to(tl.float32), mask=inside)
    tl.store(out_ptr + C + c, tl.load(sum_ptr + c, mask=inside, other=0.0).to(tl.float32), mask=inside)
    tl.store(out_ptr + 2 * C + c, b.to(tl.float32), mask=inside)
    tl.store(out_ptr + 3 * C + c, d.to(tl.float32), mask=inside)


def variance_of(rstd: torch.Tensor) -> torch.Tensor:
    """The variances whose inverse deviations `torch.batch_norm_stats(…, 0.0)` gave: 0 for 0, which it gives for 0."""
    return torch.where(rstd > 0, rstd.square().reciprocal(), torch.zeros_like(rstd))


def normalise(
    y: torch.Tensor, bn: torch.nn.BatchNorm2d, gamma: torch.Tensor, beta: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, 1/sqrt(var + eps), scale and shift of a batch of `count` values a channel; moves the running statistics.

    All are (C,) fp32, of y (N, C, H, W) in channels-last.
    """
    mean, rstd = batch_statistics(y)
    C, into = y.shape[1], (bn.running_mean, bn.running_var, bn.num_batches_tracked)
    out = torch.empty((3, C), dtype=torch.float32, device=y.device)
    with torch.cuda.device_of(y):
        _scales[(triton.cdiv(C, _TILE),)](
            mean, rstd, gamma, beta, *into, out, bn.eps, bn.momentum, count / (count - 1), C, _TILE
        )
    torch.autograd.graph.increment_version(into)
    return mean, *out.unbind()


def norm_gradients(
    sums: torch.Tensor, joint: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, scale: torch.Tensor, count: int
) -> tuple[torch.Tensor, ...]:
    """As `norm.gradients`: of gamma and beta, and b and d of `Call.affine`."""
    C = scale.numel()
    out = torch.empty((4, C), dtype=torch.float32, device=sums.device)
    with torch.cuda.device_of(sums):
        _norm_gradients[(triton.cdiv(C, _TILE),)](sums, joint, mean, rstd, scale, out, count, C, _TILE)
    return out.unbind()


def batch_statistics(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and inverse deviation of the channels of (N, C, H, W), in fp32; 0 for a variance of 0."""
    if y.device.type != "cpu":
        return torch.batch_norm_stats(y, 0.0)
    var, mean = torch.var_mean(y.float(), (0, 2, 3), correction=0)
    return mean, torch.where(var > 0, var.rsqrt(), torch.zeros_like(var))  # as on a GPU


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Call:
    """One layer's T steps over rows of M elements, with the interface of `compiled.Call`."""

    rule: Rule
    num_steps: int
    num_channels: int
    """C; any number from 1 where no channels are scaled."""
    static: bool
    width: torch.Tensor
    amplitude: torch.Tensor
    leak: torch.Tensor | None

    def _tiles(self, x: torch.Tensor, scaled: bool) -> tuple[int, int, int, int, tuple[int]]:
        """R, C, the tile's two sides and the grid; where no channels are scaled, x is one row of all its elements."""
        M = x.numel() // (1 if self.static else self.num_steps)
        C = self.num_channels if scaled else M
        # The potentials of more steps fit in the registers of a smaller tile only (benchmarks/kernel_table.py).
        elements = _TILE if self.num_steps <= 8 else _TILE // 2
        return M // C, C, *tiles(M // C, C, 64 if scaled else elements, elements)

    def forward(self, x, scale, shift, shortcut, v, want_state: bool, out: torch.Tensor | None = None):
        """As `compiled.Call.forward`."""
        R, C, block_r, block_c, grid = self._tiles(x, scale is not None)
        rule = self.rule
        out = x.new_empty((self.num_steps, *x.shape[1:])) if out is None else out
        state = x.new_empty(x.shape[1:], dtype=torch.float32) if want_state else None
        with torch.cuda.device_of(x):
            _forward[grid](
                x, scale, shift, shortcut, v, out, state, self.leak, rule.v_th, rule.v_reset, R, C,
                T=self.num_steps, STATIC=self.static, NORM=scale is not None, ADD=shortcut is not None,
                LEAKY=rule.leaky, HARD=rule.hard, FROM_STATE=v is not None, TO_STATE=want_state,
                BLOCK_R=block_r, BLOCK_C=block_c,
            )  # fmt: skip
        return out, state

    def backward(self, grad_s, grad_last, x, scale, shift, mean, v, counted: bool, grad_x: torch.Tensor | None = None):
        """As `compiled.Call.backward`."""
        R, C, block_r, block_c, grid = self._tiles(x, scale is not None)
        rule = self.rule
        partial = x.new_empty((len(COUNTED) + 1, *grid), dtype=torch.float32)
        sums = (None, None)
        if scale is not None:
            sums = x.new_empty((2, triton.cdiv(R, block_r), C), dtype=torch.float32)
        grad_x = torch.empty_like(x) if grad_x is None else grad_x
        grad_first = None if v is None else torch.empty_like(v)
        with torch.cuda.device_of(x):
            _backward[grid](
                x, scale, shift, mean, grad_s, grad_last, v, grad_x, grad_first,
                partial, sums[0], sums[1], self.leak, self.width, self.amplitude, rule.v_th, rule.v_reset, R, C,
                T=self.num_steps, STATIC=self.static, NORM=scale is not None, LEAKY=rule.leaky, HARD=rule.hard,
                DETACH=rule.detach, SHAPE=surrogate.IN_KERNELS.index(rule.shape), PEAK=rule.scale == "peak",
                FROM_STATE=v is not None, TO_STATE=grad_last is not None, COUNT=counted,
                BLOCK_R=block_r, BLOCK_C=block_c,
            )  # fmt: skip
        wanted = counted or self.leak is not None
        totals = partial.sum(1, dtype=torch.float64) if wanted else partial[:, 0]
        counts = totals[: len(COUNTED)] if counted else None
        grad_leak = None if self.leak is None else totals[-1].to(self.leak.dtype)
        if isinstance(sums, torch.Tensor):
            sums = sums.sum(1, dtype=torch.float64)
        return grad_x, grad_first, grad_leak, sums, counts

    @staticmethod
    def statistics(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and biased variance of the channels of (N, C, H, W), in fp32."""
        mean, rstd = batch_statistics(y)
        return mean, variance_of(rstd)

    @staticmethod
    def affine(y: torch.Tensor, grad: torch.Tensor, a: torch.Tensor, b: torch.Tensor, d: torch.Tensor) -> None:
        """grad <- a grad + b y + d by channel, in place."""
        C = a.numel()
        block_r, block_c, grid = tiles(grad.numel() // C, C)
        with torch.cuda.device_of(y):
            _affine[grid](y, grad, a, b, d, grad.numel() // C, C, block_r, block_c)
