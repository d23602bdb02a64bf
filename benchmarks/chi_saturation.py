"""Each indicator over the width, and where it saturates, with batch normalisation and without.

    python -m benchmarks.chi_saturation [--plot docs/chi-saturation.png]

Six layers of convolution and IF neurons, T = 4, on 64 of scikit-learn's digits. One backward pass for each width; all
layers have the same width, and all else is equal.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pipeline import chi
from pipeline.snn.neurons import Neuron, Rule

DEPTH, CHANNELS, T = 6, 16, 4
GAIN = 2.5
"""Factor on Kaiming's initial weights: without it, and without normalisation, spikes die out after a few layers."""
WIDTHS = torch.logspace(-4, 1, 31)
COLUMNS = {"chi": "χ", "participation": "participation", "coverage": "coverage", "grad_norm": "gradient norm"}


class Stack(nn.Module):
    def __init__(self, normalised: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for depth in range(DEPTH):
            conv = nn.Conv2d(CHANNELS if depth else 1, CHANNELS, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            conv.weight.data *= GAIN
            norm = nn.BatchNorm2d(CHANNELS) if normalised else nn.Identity()
            self.layers.append(nn.Sequential(conv, norm, Neuron(Rule(shape="triangle"))))
        self.out = nn.Linear(CHANNELS, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = images.expand(T, *images.shape)
        for conv, norm, neuron in self.layers:  # pyright: ignore[reportGeneralTypeIssues]
            x = neuron(norm(conv(x.flatten(0, 1))).unflatten(0, (T, -1)))
        return self.out(x.mean((0, 3, 4)))


def measure(normalised: bool) -> dict[str, Tensor]:
    """Each indicator, `(len(WIDTHS), DEPTH)`."""
    torch.manual_seed(0)
    network = Stack(normalised)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    pilot = chi.attach(network, optimizer, policy="fixed")
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels[:64]).float().view(-1, 1, 8, 8).repeat_interleave(2, 2).repeat_interleave(2, 3) / 8
    rows: dict[str, list[Tensor]] = {name: [] for name in COLUMNS}
    for width in WIDTHS:
        # The pilot writes widths after every step: under policy fixed, the last ones that it was given.
        pilot.neurons.widths.fill_(width)
        nn.functional.cross_entropy(network(images), torch.tensor(labels[:64])).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert pilot.indicators is not None
        for name, values in rows.items():
            values.append(getattr(pilot.indicators, name))
    return {name: torch.stack(values) for name, values in rows.items()}


def plot(measured: dict[str, dict[str, Tensor]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 4, figsize=(13, 5.4), layout="constrained", sharex=True)
    for axes_row, (title, indicators) in zip(grid, measured.items(), strict=True):
        for axes, (name, label) in zip(axes_row, COLUMNS.items(), strict=True):
            for layer in range(DEPTH):
                colour = plt.get_cmap("viridis")(layer / (DEPTH - 1))
                axes.plot(WIDTHS, indicators[name][:, layer], color=colour, label=f"layer {layer + 1}")
            axes.set_xscale("log")
            axes.set_title(f"{label}, {title}", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
            if name == "grad_norm":
                axes.set_yscale("log")
            else:
                axes.set_ylim(-0.03, 1.05)
    for axes in grid[1]:
        axes.set_xlabel("half-width w of the surrogate")
    grid[0, 2].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--plot", metavar="FILE", help="draw the indicators over the width here")
    arguments = parser.parse_args()
    measured = {"batch normalised": measure(True), "not normalised": measure(False)}
    for title, indicators in measured.items():
        print(f"{title}: lowest and highest over the layers")
        for index in range(0, len(WIDTHS), 3):
            values = [f"{label} {indicators[n][index].min():.4f}-{indicators[n][index].max():.4f}"
                      for n, label in COLUMNS.items()]  # fmt: skip
            print(f"  w = {WIDTHS[index]:8.4f}  " + "  ".join(values))
    if arguments.plot:
        plot(measured, arguments.plot)


if __name__ == "__main__":
    main()
