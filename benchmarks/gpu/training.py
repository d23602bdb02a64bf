"""200 steps of a small network: what it learns on the GPU against what it learns on the CPU, in fp32."""

import torch

from benchmarks.gpu.findings import Findings
from pipeline.config import ModelConfig
from pipeline.snn import losses, neurons
from pipeline.snn.networks import sew_resnet

STEPS, BATCH, SIZE, CLASSES = 200, 32, 32, 10
FIRST, LAST = 0.01, 0.15
"""How far the losses may lie apart, relative: the first one, by rounding alone; the mean of the last quarter. A spike
is a step function, so that roundings grow into other spikes, and single later losses differ."""


def curve(device: torch.device, steps: int, size: int, batch: int) -> list[float]:
    """Losses of `steps` steps on images that hold a pattern for their class, the same on every device."""
    torch.manual_seed(0)
    network = sew_resnet.build(ModelConfig(arch="sew_tiny"), num_classes=CLASSES, image_size=size).to(device)
    neurons.bind(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randn(CLASSES, 3, size, size, generator=generator)
    found = []
    for _ in range(steps):
        labels = torch.randint(CLASSES, (batch,), generator=generator)
        images = 0.5 * patterns[labels] + torch.randn(batch, 3, size, size, generator=generator)
        optimizer.zero_grad()
        loss = losses.cross_entropy(network(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found).tolist()


def training(findings: Findings, device: torch.device) -> None:
    """Both curves. Simulated, they are the same one, twice."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    sizes = (2, 8, 2) if findings.simulated else (STEPS, SIZE, BATCH)
    here, there = curve(device, *sizes), curve(torch.device("cpu"), *sizes)
    apart = abs(here[0] / there[0] - 1)
    findings.check("the first loss", apart <= FIRST, f"{apart:.2g} apart, {FIRST} allowed")
    quarter = max(1, len(here) // 4)
    ours, theirs = sum(here[-quarter:]) / quarter, sum(there[-quarter:]) / quarter
    apart = abs(ours / theirs - 1)
    findings.check("the mean of the last losses", apart <= LAST, f"{apart:.2g} apart, {LAST} allowed")
    findings.figure("loss at the end", ours, "nats")
    findings.figure("loss at the end, CPU", theirs, "nats")
