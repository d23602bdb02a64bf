"""What is known to go wrong on GPUs and nowhere else."""

from functools import partial

import torch
from torch import nn

from benchmarks.gpu.findings import Findings
from benchmarks.gpu.kernel_checks import numbers
from pipeline.config import ChiConfig, ModelConfig
from pipeline.snn import losses, neurons
from pipeline.snn.kernels import dispatch, norm, packing
from pipeline.snn.kernels.reference import Rule
from pipeline.snn.kernels.tally import Tally
from pipeline.snn.networks import sew_resnet


def traps(findings: Findings, device: torch.device) -> None:
    """Each of them; the next goes on after a failure."""
    for silent in ("first", "middle", "every"):
        findings.attempt(f"a channel silent in the {silent} micro-batch", partial(silent_channel, silent, device))
    many = 40_000_000 if device.type == "cuda" else 4001
    findings.attempt(f"one layer of {many} neurons without channels", partial(one_row, many, device))
    findings.attempt("max-pooling of spikes twice: the same bits", partial(pooling, device))
    findings.attempt("fp16: calibration, then two steps", partial(half, device))


def silent_channel(when: str, device: torch.device) -> str:
    """The running variance stays finite, and is what torch's own normalisation gives."""
    bn, theirs = nn.BatchNorm2d(4).to(device), nn.BatchNorm2d(4).to(device)
    one = torch.tensor(1.0, device=device)
    for number, at in enumerate(("first", "middle", "last")):
        y = numbers((8, 4, 5, 5), device, number)
        if when in (at, "every"):
            y[:, 2] = 0
        norm.run(y.requires_grad_(), bn, Rule(), one, one, num_steps=4).sum().backward()
        theirs(y.detach())
        assert y.grad is not None
        assert y.grad.isfinite().all(), "a gradient is not finite"
    assert bn.running_mean is not None
    assert bn.running_var is not None
    torch.testing.assert_close(bn.running_var, theirs.running_var, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bn.running_mean, theirs.running_mean, rtol=1e-4, atol=1e-6)
    return f"running variance {bn.running_var[2].item():.4g}"


def one_row(many: int, device: torch.device) -> None:
    """A second grid dimension ends at 65,535 blocks; all neurons must be reached."""
    one = torch.tensor(1.0, device=device)
    x = torch.full((1, many), 0.5, dtype=torch.bfloat16, device=device)
    x[:, -1] = 2
    tally = Tally(device)
    s, _ = dispatch.run(x.requires_grad_(), Rule(), one, one, tally=tally)
    s.sum(dtype=torch.float32).backward()
    assert s[0, -1] == 1
    assert s.sum(dtype=torch.float64) == 1
    assert tally.counts[0] == many, f"{tally.counts[0]:.0f} neurons were counted"


def pooling(device: torch.device) -> None:
    """Overlapping windows add to one gradient: in any order of additions only if it is fixed."""
    pool = nn.MaxPool2d(3, 2, 1)
    side = 112 if device.type == "cuda" else 12
    spikes = (numbers((8, 16, side, side), device) > 0.8).to(torch.bfloat16)
    spikes = spikes.contiguous(memory_format=torch.channels_last)
    weight = numbers((8, 16, side // 2, side // 2), device, 1).to(torch.bfloat16)
    found = []
    for _ in range(5):
        x = spikes.clone().requires_grad_()
        out = packing.max_pool2d(x, pool)
        out.backward(weight)
        assert x.grad is not None
        found.append((out, x.grad))
    assert torch.equal(found[0][0], pool(spikes)), "the maxima are not torch's"
    total = found[0][1].sum(dtype=torch.float64)
    torch.testing.assert_close(total, weight.sum(dtype=torch.float64), rtol=1e-3, atol=1.0)
    differing = sum(not torch.equal(found[0][1], grad) for _, grad in found[1:])
    assert not differing, f"{differing} of 4 repetitions gave another gradient"


def half(device: torch.device) -> str:
    """As DeepSpeed's fp16: parameters of convolutions in fp16, normalisation in fp32."""
    from pipeline.chi.widths import Widths

    batch, side = (2, 8) if device.type == "cpu" else (8, 16)
    torch.manual_seed(0)
    network = sew_resnet.build(ModelConfig(arch="sew_tiny"), num_classes=10, image_size=side).to(device)
    state = neurons.bind(network)
    widths = Widths(ChiConfig(calibrate=True), network.spiking_layers(), state)
    images, labels = numbers((batch, 3, side, side), device), torch.arange(batch, device=device)
    with torch.autocast(device.type, torch.float16):
        widths.calibrate(network, images.half())
    assert state.widths.isfinite().all()
    network.train()
    for _ in range(2):
        network.zero_grad()
        with torch.autocast(device.type, torch.float16):
            logits = network(images.half())
        loss = losses.cross_entropy(logits, labels)
        (loss * 128).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters()), "a gradient is not finite"
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 / 128 * parameter.grad
    return f"widths {state.widths.min():.3f} to {state.widths.max():.3f}, loss {loss.item():.3f}"
