"""Twenty steps of the real training loop in doubles, by two ranks: numbers that a change must not move.

    python -m tests.golden --reason "why the numbers have changed"      writes tests/golden.json anew

The launcher runs launch/train.py with train.precision=fp64, in which no kernel but the reference runs. Nothing of it
depends on the machine beyond rounding: weights come from the order's integer hash, images are scikit-learn's digits as
they are. It covers the loader and its order, the network and its neurons, TET, label smoothing, the
schedule, the optimizer, the all-reduce, χ's control of the widths, the moving average and the evaluation.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from pipeline.config import ModelConfig
from pipeline.data.manifest import Manifest
from pipeline.data.order import mix
from pipeline.errors import EXIT_DONE
from pipeline.metrics.journal import read_journal
from pipeline.run_dir.checkpoint_files import load_newest
from pipeline.snn.networks import sew_resnet
from tests.conftest import ROOT, launch

FILE = Path(__file__).with_name("golden.json")
STEPS, BATCH, MICRO_BATCH, T = 20, 32, 8, 3


def fill(network: torch.nn.Module) -> None:
    """Fills in weights that depend on their place alone, uniform and about as large as a fresh network's."""
    with torch.no_grad():
        for index, (name, parameter) in enumerate(network.named_parameters()):
            if parameter.dim() > 1 or name == "fc.bias":
                draws = mix(0, index, np.arange(parameter.numel())) >> np.uint64(11)
                uniform = torch.from_numpy(draws.astype(np.float64) * 2.0**-52 - 1).view_as(parameter)
                parameter.copy_(uniform * (6 / max(6, parameter[0].numel())) ** 0.5)


def arguments(digits: Path, weights: Path, run_dir: Path) -> list[str]:
    """The command line, with `digits` as shards and the initial `weights` as a safetensors file."""
    epochs = (STEPS - 0.5) * BATCH / Manifest.load(digits / "train").num_samples  # the number of steps is rounded up
    settings = {
        "--recipe": "digits",
        "--run_dir": run_dir,
        "--init-from": weights,
        "--data.path": digits,
        "--data.image_size": 8,  # the size of the files, uncropped: nothing is interpolated
        "--data.crop_area_min": 1,
        "--data.crop_aspect": 1,
        "--data.global_batch": BATCH,
        "--data.micro_batch": MICRO_BATCH,
        "--model.neuron": "plif",
        "--model.T": T,
        "--chi.interval": 4,
        "--chi.calibrate": "false",  # width 1, the same in all layers: nothing else hangs on the first images
        "--optim.lr": 0.2,
        "--optim.weight_decay": 1e-3,
        "--optim.nesterov": "true",
        "--optim.warmup_epochs": 0.1,
        "--train.precision": "fp64",
        "--train.zero_stage": 0,
        "--train.epochs": epochs,
        "--train.loss": "tet",
        "--train.tet_lambda": 0.05,
        "--train.label_smoothing": 0.1,
        "--train.ema_decay": 0.9,
        "--train.log_every": 1,
        "--metrics.port": 0,
    }
    return [str(word) for pair in settings.items() for word in pair]


def run(digits: Path, folder: Path) -> dict[str, list[float]]:
    """Losses, rates and χ of all steps; at the end the widths, the norms of the last and the averaged weights, and the
    evaluation's loss. Everything is left in `folder`.
    """
    network = sew_resnet.build(ModelConfig(arch="sew_tiny", neuron="plif", T=T), num_classes=10, image_size=8).double()
    fill(network)
    save_file(network.state_dict(), folder / "weights.safetensors")
    ended = launch("launch/train.py", *arguments(digits, folder / "weights.safetensors", folder / "run"), ranks=2)
    assert ended.returncode == EXIT_DONE, ended.output
    journal = read_journal(folder / "run" / "metrics.jsonl")
    steps = [record for record in journal if "train_loss" in record]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    saved = load_newest(folder / "run")
    assert saved is not None
    parts = (saved[name]["parameters"] for name in ("model", "ema"))
    return {
        "losses": [record["train_loss"] for record in steps],
        "coverage": [sum(record["layer_coverage_ratio"]) for record in steps],
        "network_chi": [record["network_chi"] for record in steps],
        "grad_norm": [record["train_grad_norm"] for record in steps],
        "widths": steps[-1]["layer_surrogate_width"],
        "norms": [torch.cat([tensor.flatten() for tensor in part.values()]).norm().item() for part in parts],
        "evaluation": [record["eval_loss"] for record in journal if "eval_loss" in record],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the golden numbers anew.")
    parser.add_argument("--reason", required=True, help="why they change; it is kept beside them")
    reason = parser.parse_args().reason
    before = json.loads(FILE.read_text(encoding="utf-8"))["reasons"] if FILE.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        digits = Path(folder) / "digits"
        subprocess.run([sys.executable, "-m", "data_prep", "digits", str(digits)], check=True, cwd=ROOT)
        numbers = run(digits, Path(folder))
    document = {"reasons": [*before, reason], "torch": torch.__version__, **numbers}
    FILE.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
