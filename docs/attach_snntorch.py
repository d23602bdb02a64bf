"""χ control in an snnTorch script: leaky neurons on events. The lines with an arrow are all that it takes.

python docs/attach_snntorch.py [--steps 300] [--checkpoint FILE]      goes on from FILE where there is one

The events are the changes of brightness of a digit that moves to the right by a pixel a step, as a camera for events
sees it: +1 and -1 in two channels.
"""

import argparse
from pathlib import Path

import snntorch as snn
import torch
from sklearn.datasets import load_digits
from snntorch import surrogate
from torch import nn
from torch.nn.functional import cross_entropy

from pipeline import chi  # ←

T, BATCH = 6, 64
pixels, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))


def events_of(chosen: torch.Tensor) -> torch.Tensor:
    """(T, N, 2 * 8 * 14), 0 or 1."""
    frames = torch.zeros(T + 1, len(chosen), 8, 14)
    for step in range(T + 1):
        frames[step, :, :, step : step + 8] = pixels[chosen].float().view(-1, 8, 8) / 16
    change = frames[1:] - frames[:-1]
    return torch.stack((change > 0.2, change < -0.2), 2).float().flatten(2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        grad = surrogate.fast_sigmoid(slope=25)
        self.first, self.lif = nn.Linear(2 * 8 * 14, 128), snn.Leaky(beta=0.8, spike_grad=grad)
        self.second, self.lif2 = nn.Linear(128, 64), snn.Leaky(beta=0.8, spike_grad=grad)
        self.out = nn.Linear(64, 10)

    def forward(self, events):  # (T, N, 224) → (N, 10)
        v, v2, out = self.lif.init_leaky(), self.lif2.init_leaky(), []
        for x in events:
            spikes, v = self.lif(self.first(x), v)
            spikes, v2 = self.lif2(self.second(spikes), v2)
            out.append(self.out(spikes))
        return torch.stack(out).mean(0)


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--checkpoint", type=Path)
arguments = parser.parse_args()

torch.manual_seed(0)
net = Net()
chi.prepare(net)  # ← a surrogate of its own for each layer, in the place of the shared one
optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
pilot = chi.attach(net, optimizer, steps=300)  # ←
first = 0
if arguments.checkpoint and arguments.checkpoint.exists():
    state = torch.load(arguments.checkpoint)
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    pilot.load_state_dict(state["pilot"])  # ←
    first = state["step"]

for step in range(first, arguments.steps):
    batch = torch.randint(0, 1500, (BATCH,), generator=torch.Generator().manual_seed(step))
    loss = cross_entropy(net(events_of(batch)), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 9:
        print(f"step {step + 1} loss {loss.item()!r}")

state = {"step": arguments.steps, "net": net.state_dict(), "optimizer": optimizer.state_dict()}
state["pilot"] = pilot.state_dict()  # ←
if arguments.checkpoint:
    torch.save(state, arguments.checkpoint)
with torch.no_grad():
    accuracy = (net(events_of(torch.arange(1500, 1797))).argmax(1) == labels[1500:]).float().mean()
print(f"accuracy {100 * accuracy:.1f} %")
print(f"widths {pilot.neurons.widths.tolist()}, coverage {pilot.indicators.coverage.tolist()}")  # ←
