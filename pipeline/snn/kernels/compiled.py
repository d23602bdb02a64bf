"""The CPU twin: cpu.cpp, compiled by the machine's C++ compiler at first use, forward and backward.

It keeps x and not h: the backward pass recomputes h, in the first-level cache. So one bf16 neuron-step moves 4 bytes
forward (x, s) and 6 backward (x, grad s, grad x), and keeps only x. The backward pass is derived by hand from the
definition in reference.py. With g = g(h - v_th), and `grad v[T]` the gradient of the returned state (0 without one),
for t = T .. 1:

    dv/dh   = 1 - s [+ (v_reset - h) g]  hard;  1 [- v_th g]  soft;  [...] where the reset is not detached
    grad h[t]   = grad s[t] g + grad v[t] dv/dh
    grad x[t]   = grad h[t]               IF;   grad h[t] leak         leaky
    grad v[t-1] = grad h[t]               IF;   grad h[t] (1 - leak)   leaky
    grad leak   = sum_t grad h[t] (x[t] - (v[t-1] - v_reset))

Why C++ and not torch.compile: Inductor took 15 s at each start with a warm cache (60 s with a cold one) and 225 MB of
resident memory in every rank; this compiler run takes 2 s, once on a machine.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.errors import ConfigError
from pipeline.run_dir import caches
from pipeline.snn import surrogate
from pipeline.snn.kernels.reference import Rule
from pipeline.snn.kernels.tally import COUNTED

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("cpu.cpp")
# -ffp-contract=off keeps the bits of the reference; the other two only drop errno and signalling exceptions.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fopenmp")
_long, _pointer = ctypes.c_long, ctypes.c_void_p
_told: list[str] = []  # why compiling failed, once it did
_SIGNATURES = {
    "spike_forward": (*[_pointer] * 7, *[_long] * 4, _pointer, _long),
    "spike_backward": (*[_pointer] * 13, *[_long] * 4, _pointer, _long),
    "channel_statistics": (*[_pointer] * 3, *[_long] * 3),
    "channel_affine": (*[_pointer] * 5, *[_long] * 3),
    "pack": (*[_pointer] * 2, *[_long] * 3),
    "unpack": (*[_pointer] * 2, *[_long] * 3),
    "gradient_sums": (*[_pointer] * 3, *[_long] * 2),
}


@functools.cache
def _machine() -> str:
    """What -march=native depends on. It is in the cache key, as different machines may share a home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    except OSError:
        return platform.machine() + platform.processor()


@functools.cache
def _library(options: tuple[str, ...]) -> ctypes.CDLL | None:
    """The kernels for these macros, compiled unless they are in the cache; None, with one warning, if that fails."""
    compiler = os.environ.get("CXX") or "g++"
    key = hashlib.sha256("\n".join((_SOURCE.read_text(), compiler, *_FLAGS, *options, _machine())).encode())
    path = caches.folder() / f"cpu-{key.hexdigest()[:20]}.so"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                built = Path(folder) / path.name
                command = [compiler, *_FLAGS, "-shared", "-fPIC", *options, str(_SOURCE), "-o", str(built)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                # Atomic: another rank may write the same file.
                built.replace(path)
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        _unavailable(error)
        return None
    for name, signature in _SIGNATURES.items():
        getattr(library, name).argtypes, getattr(library, name).restype = signature, None
    return library


def _unavailable(error: OSError | subprocess.CalledProcessError) -> None:
    if not _told:
        detail = error.stderr.strip().splitlines()[:1] if isinstance(error, subprocess.CalledProcessError) else [error]
        _told.append(f"{type(error).__name__}: {detail[0] if detail else error}")
        log.warning(
            "the CPU kernels could not be compiled, so spiking layers run the slower reference: %s; install g++ (or "
            "set CXX) and make %s writable",
            _told[0],
            caches.folder(),
        )


def why_not() -> str:
    """Why compiling failed; empty if it worked or was not tried yet."""
    return _told[0] if _told else ""


@functools.cache
def gives_way() -> bool:
    """Whether tensors on the CPU go through the Triton kernels, in Triton's interpreter: for tests of the whole path.

    Set CHISPIKE_TEST_INTERPRETER=1 and TRITON_INTERPRET=1 before the process starts. It is thousands of times slower.

    Raises:
        ConfigError: the first is set without the second.
    """
    if os.environ.get("CHISPIKE_TEST_INTERPRETER", "") in ("", "0"):
        return False
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            "CHISPIKE_TEST_INTERPRETER is set, but TRITON_INTERPRET is not 1, so Triton has no interpreter; set both "
            "(for tests of the GPU kernels), or none"
        )
    log.warning("for tests, GPU kernels run in Triton's interpreter on the CPU; else unset CHISPIKE_TEST_INTERPRETER")
    return True


def library(x: torch.Tensor, rule: Rule | None = None) -> ctypes.CDLL | None:
    """The kernels for this tensor and rule; None where the reference must run.

    The choice depends on device, dtype and whether the machine can compile: it is the same for every run and rank of a
    machine. The first call for a dtype and rule compiles, for 2 s.
    """
    if torch.compiler.is_compiling():
        # torch.export and torch.compile trace the reference: they cannot trace a ctypes function.
        return None
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16) or _told or gives_way():
        return None
    rule = rule or Rule()
    values = {
        "BF16": x.dtype == torch.bfloat16,
        "LEAKY": rule.leaky,
        "HARD": rule.hard,
        "DETACH": rule.detach,
        "SHAPE": surrogate.IN_KERNELS.index(rule.shape),
        "PEAK": rule.scale == "peak",
    }
    return _library(tuple(f"-D{name}={int(value)}" for name, value in values.items()))


class _Neuron(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_float) for name in ("v_th", "v_reset", "leak", "width", "amplitude"))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Call:
    """One layer's T steps over rows of M elements; element m belongs to channel m % C."""

    rule: Rule
    num_steps: int
    num_channels: int
    """C; any number from 1 where no channels are scaled."""
    static: bool
    """x holds one row, the same at every step."""
    width: torch.Tensor
    amplitude: torch.Tensor
    leak: torch.Tensor | None

    def _tail(self, x: torch.Tensor) -> tuple:
        # Reading a scalar on the CPU is free: there is no queue to wait for.
        leak = 0.0 if self.leak is None else self.leak.item()
        rule = self.rule
        neuron = _Neuron(rule.v_th, rule.v_reset, leak, self.width.item(), self.amplitude.item())
        sizes = (self.num_steps, x.numel() // (1 if self.static else self.num_steps), self.num_channels)
        return (*sizes, int(self.static), ctypes.byref(neuron), torch.get_num_threads())

    def forward(self, x, scale, shift, shortcut, v, want_state: bool, out: torch.Tensor | None = None):
        """Spikes (plus shortcut) in x's dtype, T rows, into `out` where given, and the last potential or None."""
        kernels = library(x, self.rule)
        assert kernels is not None
        rows = x.shape[1:]
        out = x.new_empty((self.num_steps, *rows)) if out is None else out
        state = x.new_empty(rows, dtype=torch.float32) if want_state else None
        tensors = (x, scale, shift, shortcut, v, out, state)
        kernels.spike_forward(*map(address, tensors), *self._tail(x))
        return out, state

    def backward(self, grad_s, grad_last, x, scale, shift, mean, v, counted: bool, grad_x: torch.Tensor | None = None):
        """Gradients for x (into `grad_x` where given), the first potential and leak, two sums by channel, and counts.

        Batch normalisation needs the two sums, of grad and of grad (y - mean); they are None without a scale. The
        counts are those of a meter, where `counted`, else None.
        """
        kernels = library(x, self.rule)
        assert kernels is not None
        grad_x = torch.empty_like(x) if grad_x is None else grad_x
        grad_first = None if v is None else torch.empty_like(v)
        grad_leak = None if self.leak is None else torch.zeros((), dtype=torch.float64)
        sums = x.new_zeros((2, self.num_channels), dtype=torch.float64) if scale is not None else (None, None)
        counts = torch.zeros(len(COUNTED), dtype=torch.float64) if counted else None
        tensors = (x, scale, shift, mean, grad_s, grad_last, v, grad_x, grad_first, counts, grad_leak, *sums)
        kernels.spike_backward(*map(address, tensors), *self._tail(x))
        if grad_leak is not None and self.leak is not None:
            grad_leak = grad_leak.to(self.leak.dtype)
        return grad_x, grad_first, grad_leak, sums, counts

    @staticmethod
    def statistics(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and biased variance of the channels of (N, C, H, W) in channels-last, in fp32."""
        kernels = library(y)
        assert kernels is not None
        C = y.shape[1]
        mean, variance = torch.empty(2, C)
        tensors = map(address, (y, mean, variance))
        kernels.channel_statistics(*tensors, y.numel() // C, C, torch.get_num_threads())
        return mean, variance

    @staticmethod
    def affine(y: torch.Tensor, grad: torch.Tensor, a: torch.Tensor, b: torch.Tensor, d: torch.Tensor) -> None:
        """grad <- a grad + b y + d by channel, in place."""
        kernels = library(y)
        assert kernels is not None
        kernels.channel_affine(*map(address, (y, grad, a, b, d)), y.numel(), a.numel(), torch.get_num_threads())


def address(tensor: torch.Tensor | None) -> int | None:
    """Address of a tensor's first element, for a kernel; the tensor must be dense and outlive the call."""
    return None if tensor is None else tensor.data_ptr()


class Layer(torch.autograd.Function):
    """T steps of a layer over (T, M), or over (1, M) for a current that is the same at every step."""

    @staticmethod
    def forward(ctx, x, v, leak, width, amplitude, meter, call, want_state: bool):
        ctx.save_for_backward(x, v, leak, width, amplitude)
        ctx.call = call
        return call.forward(x, None, None, None, v, want_state)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_s, grad_state):
        # Unpacking checks versions: torch raises an error if a width changed between forward and backward.
        x, v, *_ = ctx.saved_tensors
        grad_state = None if grad_state is None else grad_state.contiguous()
        counted = ctx.needs_input_grad[5]
        grad_x, grad_v, grad_leak, _, counts = ctx.call.backward(
            grad_s.contiguous(), grad_state, x, None, None, None, v, counted
        )
        return grad_x, grad_v, grad_leak, None, None, counts, None, None
