"""χ control in a plain PyTorch script with neurons of its own. The lines with an arrow are all that it takes.

python docs/attach_plain.py [--steps 300] [--checkpoint FILE]      goes on from FILE where there is one
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from pipeline import chi  # ←


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u >= 0).to(u)

    @staticmethod
    def backward(ctx, grad):
        return grad / (1 + 10 * ctx.saved_tensors[0].abs()) ** 2


class LIF(nn.Module):
    def __init__(self):
        super().__init__()
        self.spike = Spike.apply
        self.spike = chi.Surrogate()  # ← one for each layer, called on the distance to the threshold

    def forward(self, currents):  # (T, N, C) → (T, N, C)
        v, spikes = torch.zeros_like(currents[0]), []
        for x in currents:
            v = v + (x - v) / 2
            spikes.append(self.spike(v - 0.5))
            v = v * (1 - spikes[-1].detach())
        return torch.stack(spikes)


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--checkpoint", type=Path)
arguments = parser.parse_args()

torch.manual_seed(0)
pixels, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
pixels = pixels.float() / 16
net = nn.Sequential(
    nn.Linear(64, 128), nn.LayerNorm(128), LIF(), nn.Linear(128, 64), nn.LayerNorm(64), LIF(), nn.Linear(64, 10)
)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
pilot = chi.attach(net, optimizer, steps=300)  # ←
first = 0
if arguments.checkpoint and arguments.checkpoint.exists():
    state = torch.load(arguments.checkpoint)
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    pilot.load_state_dict(state["pilot"])  # ←
    first = state["step"]

for step in range(first, arguments.steps):
    batch = torch.randint(0, 1500, (64,), generator=torch.Generator().manual_seed(step))
    loss = functional.cross_entropy(net(pixels[batch].expand(4, -1, -1)).mean(0), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 9:
        print(f"step {step + 1} loss {loss.item()!r}")

state = {"step": arguments.steps, "net": net.state_dict(), "optimizer": optimizer.state_dict()}
state["pilot"] = pilot.state_dict()  # ←
if arguments.checkpoint:
    torch.save(state, arguments.checkpoint)
accuracy = (net(pixels[1500:].expand(4, -1, -1)).mean(0).argmax(1) == labels[1500:]).float().mean()
print(f"accuracy {100 * accuracy:.1f} %")
print(f"widths {pilot.neurons.widths.tolist()}, coverage {pilot.indicators.coverage.tolist()}")  # ←
