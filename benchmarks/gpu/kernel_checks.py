"""Every GPU kernel against the definition: all dtypes, odd sizes, and more elements than 32 bits count."""

from functools import partial

import torch
from torch import nn

from benchmarks.gpu.findings import Findings
from pipeline.snn.kernels import dispatch, norm, packing, reference, sums
from pipeline.snn.kernels.reference import Rule
from pipeline.snn.kernels.tally import Tally

RULES = (
    Rule(),
    Rule(hard=False, detach=False, shape="rectangle", v_th=0.75, scale="peak"),
    Rule(leaky=True, v_reset=-0.25, shape="atan"),
    Rule(leaky=True, hard=False, shape="sigmoid", scale="peak"),
)
SIZES = (1, 777, 4099)
"""Neurons: one, and two that leave the last tile partly empty."""


def numbers(shape: tuple[int, ...], device: torch.device, seed: int = 5) -> torch.Tensor:
    """Standard normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def neurons(rule: Rule, T: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Spikes, last potential, counts and gradients of `dispatch.run` against `reference.run`; raises AssertionError."""
    generator = torch.Generator().manual_seed(5)
    # Multiples of 1/8 put many potentials exactly at v_th, and are exact in every dtype.
    drawn = torch.randint(-4, 12, (T, size), generator=generator) / (4 if rule.leaky else 8)
    weight = numbers((T, size), device, 6).to(dtype)
    width, amplitude = torch.tensor(0.5, device=device), torch.tensor(1.5, device=device)
    found = []
    for run in (reference.run, partial(dispatch.run, want_state=True)):
        x = drawn.to(device, dtype).requires_grad_()
        leak = torch.tensor(0.5, device=device, requires_grad=True) if rule.leaky else None
        tally = Tally(device)
        s, v = run(x, rule, width, amplitude, leak=leak, tally=tally)
        assert v is not None
        ((s * weight).sum(dtype=torch.float32) + v.sum()).backward()
        found.append((s, v, tally.counts, x.grad, None if leak is None else leak.grad))
    (s, v, counts, dx, dleak), (s_, v_, counts_, dx_, dleak_) = found
    assert torch.equal(s, s_), f"{(s != s_).sum()} of {s.numel()} spikes differ"
    torch.testing.assert_close(v_, v, rtol=1e-6, atol=1e-6)
    assert torch.equal(counts[:3], counts_[:3]), f"counts {counts_[:3].tolist()}, wanted {counts[:3].tolist()}"
    torch.testing.assert_close(counts_[3], counts[3], rtol=1e-5, atol=1e-6)
    # fp32: terms added in another order, 1 ulp a step. Others: the gradient is rounded once when it leaves the kernel.
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(dx_, dx, rtol=rtol, atol=rtol)
    if dleak is not None:
        torch.testing.assert_close(dleak_, dleak, rtol=1e-3, atol=1e-3)


def fused(size: tuple[int, ...], static: bool, train: bool, dtype: torch.dtype, device: torch.device) -> None:
    """BN, neurons and shortcut in one op against its definition in fp32; raises AssertionError."""
    T, (n, c, h, w) = 4, size
    y = (numbers((n if static else T * n, c, h, w), device, 3) * 2 + 1).to(dtype)
    shortcut = torch.randint(0, 4, (T * n, c, h, w), generator=torch.Generator().manual_seed(4)).to(device, dtype)
    weight = numbers((T * n, c, h, w), device, 7).to(dtype).float()
    found = []
    for run, of in ((norm.run, dtype), (norm.run_reference, torch.float32)):
        torch.manual_seed(0)
        bn = nn.BatchNorm2d(c).train(train)
        with torch.no_grad():
            bn.weight.uniform_(0.5, 1.5)
            bn.bias.uniform_(-0.2, 0.6)
        bn = bn.to(device)
        y_, shortcut_ = (x.to(of, copy=True).requires_grad_() for x in (y, shortcut))
        one = torch.tensor(0.8, device=device)
        out = run(y_, bn, Rule(), one, one, num_steps=T, static=static, shortcut=shortcut_, tally=Tally(device))
        (out.float() * weight).sum().backward()
        grads = [x.grad for x in (y_, shortcut_, bn.weight, bn.bias)]
        found.append((out.float(), grads, (bn.running_mean, bn.running_var)))
    (out, grads, stats), (out_, grads_, stats_) = found
    # The normalised current differs by rounding, so a potential within some ulp of v_th may fall to the other side.
    flipped = (out != out_).sum().item()
    assert flipped <= 2e-5 * out.numel(), f"{flipped} of {out.numel()} outputs differ"
    rtol = {torch.float32: 2e-4, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    if not flipped:  # one spike more or less changes the gradients of its channel
        for got, wanted in zip(grads, grads_, strict=True):
            torch.testing.assert_close(
                got.float(), wanted, rtol=rtol, atol=rtol / 8 * max(1, wanted.abs().max().item())
            )
    for got, wanted in zip(stats, stats_, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def packed(bits: int, dtype: torch.dtype, device: torch.device) -> None:
    """Packing loses nothing; raises AssertionError."""
    x = torch.randint(0, 2**bits, (3, 8, 5, 7), generator=torch.Generator().manual_seed(0)).to(device, dtype)
    kept = packing.Packed(x, bits)
    assert kept.data is not None, "not packed"
    assert kept.data.numel() * 8 == x.numel() * bits
    assert torch.equal(kept.unpack(), x)


def summed(n: int, dtype: torch.dtype, device: torch.device) -> None:
    """A gradient's non-zeros, magnitudes and squares in one pass; raises AssertionError."""
    gradient = numbers((n,), device).to(dtype)
    gradient[::3] = 0
    ours, theirs = sums.run([gradient])[0], sums.run_reference([gradient.double()])[0]
    assert ours[0] == theirs[0], f"{ours[0]} non-zeros, wanted {theirs[0]}"
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0, check_dtype=False)


def kernels(findings: Findings, device: torch.device) -> None:
    """All kernels, small sizes; simulated, each of them once in every dtype."""
    toy = findings.simulated
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for rule, T, size in neuron_cases(toy):
            kind = f"{'LIF' if rule.leaky else 'IF'}, {rule.shape}"
            call = partial(neurons, rule, T, size, dtype, device)
            findings.attempt(f"neurons, {name}, {kind}, T={T}, {size}", call)
        for size in ((2, 24, 3, 3),) if toy else ((2, 24, 3, 3), (3, 1, 9, 7), (1, 72, 9, 1), (8, 64, 56, 56)):
            for static, train in ((False, True),) if toy else ((False, True), (True, True), (False, False)):
                call = partial(fused, size, static, train, dtype, device)
                findings.attempt(f"BN and neurons, {name}, {size}, static={static}, train={train}", call)
        for bits in (1, 4, 8):
            findings.attempt(f"packing, {name}, {bits} bits", partial(packed, bits, dtype, device))
        for n in (8197,) if toy else (1, 511, 8192, 21_800_001):
            findings.attempt(f"sums of a gradient, {name}, {n}", partial(summed, n, dtype, device))


def neuron_cases(toy: bool) -> list[tuple[Rule, int, int]]:
    """Rules, T and neurons. Every T and rule is compiled anew, so unusual T are tried with two rules only."""
    if toy:
        return [(rule, 4, SIZES[1]) for rule in RULES[::3]]
    return [(rule, T, size) for rule in RULES for T in ((1, 4, 17) if rule in RULES[::2] else (4,)) for size in SIZES]


def large(findings: Findings, device: torch.device) -> None:
    """More elements than 2^31: slices of the result, at the ends and across the border, against the definition."""
    T = 4
    size = 1031 if device.type == "cpu" else 2**29 + 4099
    if device.type == "cuda":
        free, needed = torch.cuda.mem_get_info()[0], 5 * T * size * 2
        if free < needed:
            findings.absent(
                "more than 2^31 neuron-steps", f"{free / 1e9:.0f} GB are free, {needed / 1e9:.0f} are needed"
            )
            return
    findings.attempt(f"neurons, T={T}, {size} neurons", lambda: many_neurons(T, size, device))
    findings.attempt(f"packing {T * size - T * size % 8} spikes", lambda: many_spikes(T * size - T * size % 8, device))


def many_neurons(T: int, size: int, device: torch.device) -> None:
    rule, one = Rule(), torch.tensor(1.0, device=device)
    x = torch.empty((T, size), dtype=torch.bfloat16, device=device).uniform_(-0.5, 1.0).requires_grad_()
    tally = Tally(device)
    s, _ = dispatch.run(x, rule, one, one, tally=tally)
    s.backward(torch.ones((), dtype=s.dtype, device=device).expand_as(s))
    assert x.grad is not None
    middle = size // 2
    for at in (slice(0, 1000), slice(middle - 500, middle + 500), slice(size - 1000, size)):
        part = x.detach()[:, at].clone().requires_grad_()
        wanted, _ = reference.run(part, rule, one, one)
        wanted.sum().backward()
        assert torch.equal(s[:, at], wanted), f"spikes {at} differ"
        torch.testing.assert_close(x.grad[:, at], part.grad, rtol=2**-7, atol=2**-7)
    steps = tally.counts[0].item()
    assert steps == T * size, f"{steps} neuron-steps were counted, {T * size} there are"


def many_spikes(n: int, device: torch.device) -> None:
    x = torch.empty(n, dtype=torch.bfloat16, device=device).bernoulli_(0.2)
    kept = packing.Packed(x, 1)
    assert kept.data is not None, "not packed"
    back = kept.unpack()
    for part, other in zip(x.split(2**28), back.split(2**28), strict=True):
        assert torch.equal(part, other)
