"""Networks of a user's own that the tests build."""

import textwrap
from pathlib import Path

import torch

from pipeline.config import ModelConfig
from pipeline.snn.networks.build import build
from pipeline.snn.networks.network import Network

SMALL = """
import torch
from torch import nn
from pipeline.snn import neurons

class Net(nn.Module):
    def __init__(self, model, num_classes):
        super().__init__()
        self.T = model.T
        self.conv, self.bn, self.sn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), neurons.from_config(model)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, images):
        s = self.sn(self.bn(self.conv(images))[None], num_steps=self.T)
        return self.fc(s.mean((3, 4)))

def network(model, num_classes):
    return Net(model, num_classes)
"""

JELLY = """
from torch import nn
from spikingjelly.activation_based import neuron, layer, functional

def network(num_classes, model):
    net = nn.Sequential(
        layer.Conv2d(3, 4, 3, step_mode='m'), layer.BatchNorm2d(4, step_mode='m'), neuron.LIFNode(step_mode='m'),
        layer.Flatten(step_mode='m'), nn.Linear(4 * 36, num_classes),
    )
    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
        def forward(self, images):
            return self.net(images.expand(model.T, *images.shape))
    return Timed()
"""

TORCH = """
import snntorch
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, T):
        super().__init__()
        self.T, self.fc1, self.fc2 = T, nn.Linear(3 * 64, 8), nn.Linear(8, num_classes)
        self.lif = snntorch.Leaky(beta=0.9)

    def forward(self, images):
        mem, out = self.lif.init_leaky(), []
        for _ in range(self.T):
            s, mem = self.lif(self.fc1(images.flatten(1)), mem)
            out.append(self.fc2(s))
        return torch.stack(out)

def network(num_classes, model):
    return Net(num_classes, model.T)
"""


def written(folder: Path, text: str, name: str = "mine.py") -> str:
    (folder / name).write_text(textwrap.dedent(text))
    return f"{folder / name}:network"


def built(arch: str, size: int = 8, **model) -> Network:
    torch.manual_seed(0)
    return build(ModelConfig(arch=arch, **model), num_classes=5, image_size=size)
