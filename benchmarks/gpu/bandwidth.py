"""How much of the memory bandwidth each kernel uses: bytes it must move over its time, beside a plain copy."""

import statistics
from collections.abc import Callable

import torch

from benchmarks.gpu.findings import Findings, reason
from benchmarks.gpu.kernel_checks import numbers
from pipeline.snn.kernels import fused_triton, packing_triton, sums
from pipeline.snn.kernels.reference import Rule

T, ROUNDS = 4, 20


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Median over `ROUNDS` calls by CUDA events, after three that compile and warm up; on the CPU it only runs."""
    if device.type != "cuda":
        call()
        return 1.0
    for _ in range(3):
        call()
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def bandwidth(findings: Findings, device: torch.device) -> None:
    """The kernels of stage 1 of SEW-ResNet34 at batch 64, bf16: 51.4M elements, larger than any cache."""
    size = (T * 64, 56, 56, 64) if device.type == "cuda" else (T, 4, 4, 8)
    x = numbers((T, size[0] // T * size[1] * size[2] * size[3]), device).bfloat16()
    n, C = x.numel(), size[3]
    target = torch.empty_like(x)
    rate = 4 * n / milliseconds(lambda: target.copy_(x), device) * 1e-6
    findings.figure("a plain copy", rate, "GB/s")
    one, channel = torch.tensor(1.0, device=device), torch.ones(C, device=device)
    call = fused_triton.Call(
        rule=Rule(), num_steps=T, num_channels=C, static=False, width=one, amplitude=one, leak=None
    )
    grad, byte = torch.ones_like(x), torch.empty(n // 8, dtype=torch.uint8, device=device)
    flat, shortcut = x.view(-1), torch.ones_like(x)
    spikes = torch.ones_like(flat)
    gradient = numbers((21_800_000 if device.type == "cuda" else 8197,), device)
    timed: list[tuple[str, float, Callable[[], object]]] = [
        ("forward: BN, neurons, shortcut", 6 * n, lambda: call.forward(x, channel, channel, shortcut, None, False)),
        ("forward: neurons", 4 * n, lambda: call.forward(x, None, None, None, None, False)),
        # It reads the current and the gradient and writes one; the current's second read comes from the cache.
        (
            "backward: BN, neurons",
            6 * n,
            lambda: call.backward(grad, None, x, channel, channel, channel, None, True, target),
        ),
        ("backward: BN's last step", 6 * n, lambda: call.affine(x, target, channel, channel, channel)),
        ("statistics of channels", 2 * n, lambda: call.statistics(x.view(size).permute(0, 3, 1, 2))),
        ("packing, 1 bit", 2.125 * n, lambda: packing_triton.pack(spikes, byte, 1)),
        ("unpacking, 1 bit", 2.125 * n, lambda: packing_triton.unpack(byte, spikes, 1)),
        ("sums of a gradient", 4 * gradient.numel(), lambda: sums.run([gradient])),
    ]
    for name, moved, run in timed:
        try:
            spent = milliseconds(run, device)
        except Exception as error:  # the next kernel goes on
            findings.check(name, False, reason(error))
            continue
        findings.figure(name, moved / spent * 1e-6, "GB/s")
        findings.figure(f"{name}, share of the copy's", moved / spent * 1e-6 / rate, "ratio")
