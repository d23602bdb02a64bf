"""χ control in a plain PyTorch script: two lines, marked with an arrow. `python docs/attach_example.py`"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from pipeline import chi  # ←
from pipeline.snn.neurons import Neuron, Rule


class Net(nn.Module):
    def __init__(self, T: int = 4) -> None:
        super().__init__()
        self.T = T
        self.first, self.norm, self.spikes = nn.Linear(64, 128), nn.BatchNorm1d(128), Neuron(Rule(shape="triangle"))
        self.second, self.spikes2, self.out = nn.Linear(128, 64), Neuron(Rule(shape="triangle")), nn.Linear(64, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:  # (N, 64) → (N, 10)
        s = self.spikes(self.norm(self.first(pixels))[None], num_steps=self.T)
        return self.out(self.spikes2(self.second(s))).mean(0)


torch.manual_seed(0)
pixels, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
pixels, net = pixels.float() / 16, Net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
pilot = chi.attach(net, optimizer, steps=300, target=0.5, target_end=0.3)  # ←
for _ in range(300):
    batch = torch.randint(0, 1500, (64,))
    nn.functional.cross_entropy(net(pixels[batch]), labels[batch]).backward()
    optimizer.step()
    optimizer.zero_grad()
accuracy = (net.eval()(pixels[1500:]).argmax(1) == labels[1500:]).float().mean()
print(f"accuracy {100 * accuracy:.1f} %, widths {pilot.neurons.widths}, coverage {pilot.indicators.coverage}")
