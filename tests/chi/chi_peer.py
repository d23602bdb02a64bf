"""SpikingJelly 2.0.0's neurons under `chi.attach`, run by test_attach.py where its environment exists."""

import sys
import types

import torch
from torch import nn

sys.modules.setdefault("torchvision", types.ModuleType("torchvision"))

from spikingjelly.activation_based import functional, neuron  # pyright: ignore[reportMissingImports]  # noqa: E402

from pipeline import chi  # noqa: E402


def train(step_mode: str) -> tuple[list[float], list[float]]:
    torch.manual_seed(0)

    def spiking(kind):
        return kind(surrogate_function=chi.Surrogate("triangle"), detach_reset=True, step_mode=step_mode)

    net = nn.Sequential(nn.Linear(5, 16), spiking(neuron.IFNode), nn.Linear(16, 8), spiking(neuron.LIFNode))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pilot = chi.attach(net, optimizer, target=0.4, target_end=0.4, interval=1)
    x = 2 * torch.randn(4, 3, 5)
    for _ in range(3):
        functional.reset_net(net)
        out = net(x) if step_mode == "m" else torch.stack([net(x_t) for x_t in x])
        out.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert pilot.indicators is not None
    assert [layer.weight for layer in pilot.layers] == [net[0].weight, net[2].weight]
    assert (pilot.indicators.firing_rate > 0)[0]
    return pilot.neurons.widths.tolist(), pilot.indicators.coverage.tolist()


if __name__ == "__main__":
    multi, single = train("m"), train("s")
    assert multi == single, (multi, single)
    assert all(width != 1.0 for width in multi[0])
    print("steered", multi)
