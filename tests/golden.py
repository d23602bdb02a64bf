"""Twenty steps of training in doubles, in one plain process on the reference: losses that a change must not move.

    python -m tests.golden --reason "why the numbers are others now"      writes tests/golden.json anew

Nothing of it depends on the machine beyond rounding: weights come from the order's integer hash, images are
scikit-learn's digits as they are. What it holds together is the order of samples, the network and its neurons, TET,
label smoothing, the schedule, the optimizer, χ's control of the widths and the moving average's share.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from pipeline import chi
from pipeline.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from pipeline.data.order import Order, mix
from pipeline.ema import decay_at
from pipeline.engine import learning_rate, optimizer_of
from pipeline.snn import readout, sew_resnet

FILE = Path(__file__).with_name("golden.json")
STEPS, SAMPLES, BATCH, MICRO_BATCH = 20, 256, 32, 16
CONFIG = Config(
    recipe="golden",
    data=DataConfig(image_size=8, global_batch=BATCH, micro_batch=MICRO_BATCH),
    model=ModelConfig(neuron="plif", T=3),
    optim=OptimConfig(lr=0.2, weight_decay=1e-3, nesterov=True, warmup_epochs=0.5),
    train=TrainConfig(epochs=STEPS * BATCH / SAMPLES, loss="tet", tet_lambda=0.05, label_smoothing=0.1, ema_decay=0.9),
)


def fill(network: torch.nn.Module) -> None:
    """Weights that follow from their place alone, uniform and about as large as a fresh network's."""
    with torch.no_grad():
        for index, (name, parameter) in enumerate(network.named_parameters()):
            if parameter.dim() > 1 or name == "fc.bias":
                draws = mix(0, index, np.arange(parameter.numel())) >> np.uint64(11)
                uniform = torch.from_numpy(draws.astype(np.float64) * 2.0**-52 - 1).view_as(parameter)
                parameter.copy_(uniform * (6 / max(6, parameter[0].numel())) ** 0.5)


def run() -> dict[str, list[float]]:
    """The losses of all steps; at the end the widths, and the norms of the last and the averaged weights."""
    pixels, labels = (torch.from_numpy(array[:SAMPLES]) for array in load_digits(return_X_y=True))
    images = (pixels / 16).view(-1, 1, 8, 8).expand(-1, 3, 8, 8)
    network = sew_resnet.build(CONFIG.model, num_classes=10, image_size=8).double()
    fill(network)
    optimizer = optimizer_of(CONFIG.optim, network)
    pilot = chi.attach(network, optimizer, steps=STEPS, target=0.5, target_end=0.3, interval=4)
    order, losses = Order([100, 156], seed=1, window_shards=1), []
    average = [parameter.detach().clone() for parameter in network.parameters()]
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(CONFIG, step, SAMPLES)
        optimizer.zero_grad()
        total = 0.0
        for start in range(step * BATCH, (step + 1) * BATCH, MICRO_BATCH):
            _, numbers = order.samples(start, MICRO_BATCH)
            loss = readout.loss(CONFIG.train, network(images[numbers]), labels[numbers]) * (MICRO_BATCH / BATCH)
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
        share = decay_at(CONFIG.train.ema_decay, step)
        for mean, parameter in zip(average, network.parameters(), strict=True):
            mean.lerp_(parameter.detach(), 1 - share)
    norms = [torch.cat([p.detach().flatten() for p in part]).norm().item() for part in (network.parameters(), average)]
    return {"losses": losses, "widths": pilot.neurons.widths.tolist(), "norms": norms}


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the golden numbers anew.")
    parser.add_argument("--reason", required=True, help="why they change; it is kept beside them")
    reason = parser.parse_args().reason
    before = json.loads(FILE.read_text(encoding="utf-8"))["reasons"] if FILE.exists() else []
    document = {"reasons": [*before, reason], "torch": torch.__version__, **run()}
    FILE.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
