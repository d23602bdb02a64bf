"""χ control in a SpikingJelly script: its SEW-ResNet18 on images of CIFAR's size. The lines with an arrow are all.

python docs/attach_spikingjelly.py [--steps 200] [--checkpoint FILE]      goes on from FILE where there is one

The images are scikit-learn's digits, so that it runs everywhere; put your data set in the place of `batch_of`.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.model import sew_resnet
from torch.nn.functional import cross_entropy, interpolate

from pipeline import chi  # ←

T, BATCH = 4, 16
pixels, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))


def batch_of(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (T, N, 3, 32, 32) and labels (N,)."""
    images = interpolate(pixels[chosen].float().view(-1, 1, 8, 8) / 16, size=32, mode="bilinear")
    return images.expand(T, -1, 3, -1, -1), labels[chosen]


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--checkpoint", type=Path)
arguments = parser.parse_args()

torch.manual_seed(0)
net = sew_resnet.sew_resnet18(num_classes=10, cnf="ADD", spiking_neuron=neuron.IFNode,
                              surrogate_function=surrogate.ATan(), detach_reset=True)  # fmt: skip
functional.set_step_mode(net, "m")
chi.prepare(net)  # ← a surrogate of its own for each of the 17 layers
optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
pilot = chi.attach(net, optimizer, steps=200)  # ←
first = 0
if arguments.checkpoint and arguments.checkpoint.exists():
    state = torch.load(arguments.checkpoint)
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    pilot.load_state_dict(state["pilot"])  # ←
    first = state["step"]

for step in range(first, arguments.steps):
    images, wanted = batch_of(torch.randint(0, 1500, (BATCH,), generator=torch.Generator().manual_seed(step)))
    loss = cross_entropy(net(images).mean(0), wanted)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    functional.reset_net(net)
    print(f"step {step + 1} loss {loss.item()!r}")

state = {"step": arguments.steps, "net": net.state_dict(), "optimizer": optimizer.state_dict()}
state["pilot"] = pilot.state_dict()  # ←
if arguments.checkpoint:
    torch.save(state, arguments.checkpoint)
images, wanted = batch_of(torch.arange(1500, 1756))
with torch.no_grad():
    accuracy = (net.eval()(images).mean(0).argmax(1) == wanted).float().mean()
print(f"accuracy {100 * accuracy:.1f} %")
print(f"widths {pilot.neurons.widths.tolist()}, coverage {pilot.indicators.coverage.tolist()}")  # ←
