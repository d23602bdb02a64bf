"""Evaluates a checkpoint on a split, in one process:  python -m launch.evaluate runs/digits --json digits.json

Prints accuracy, loss, the confusion matrix, firing rates and the 45 nm energy estimate. Every sample counts once. A
result with the run's own settings and data is also kept in RUN/evaluations/, where `launch.export` finds it.
"""

import dataclasses
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from launch import command
from launch.evaluation_table import SHOWN, table
from pipeline.config import Config, DataConfig
from pipeline.data.manifest import EVALUATION, MANIFEST_NAME, Manifest, differing, load_manifest
from pipeline.data.remote import is_remote, join
from pipeline.errors import ConfigError, DataError, is_outage
from pipeline.run_dir import run_folder

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.engine.evaluate import Detail
    from pipeline.engine.load_network import Trained

MEASURED = 512  # samples of a larger split whose operations are counted: counting costs several forward passes
PAIRS = 12  # most pairs of confused classes
PAUSE_S = 10.0  # between two lines of progress


def main(arguments: list[str]) -> None:
    parser = command.run_parser("evaluate", "Evaluates a run's checkpoint on a split: every sample once.")
    parser.add_argument("--data", metavar="DIR", help="folder or URL of the shard sets [the run's data.path]")
    parser.add_argument("--split", default="val", help="the shard set in it [val]")
    parser.add_argument("--T", type=int, help="time steps [the run's]")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the images [the run's]")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16", "fp64"), help="arithmetic [the run's]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result as JSON")
    options = parser.parse_args(arguments)
    stored = run_folder.read(options.run)
    config = override(stored.config, options)
    manifest = find_split(config.data, options.split)
    check_classes(manifest, stored.about.get("classes"), config.data.path)
    if options.json and not options.json.parent.is_dir():
        raise ConfigError(f"--json {options.json}: there is no folder {options.json.parent}; make it first")

    from pipeline.engine import load_network  # torch is imported here, after everything cheap was checked

    checkpoint = load_network.load(options.run, config, step=options.checkpoint, weights=options.weights)
    if checkpoint.network.in_channels != manifest.channels:
        raise ConfigError(
            f"{join(config.data.path, options.split)} holds {manifest.kind}, {manifest.channels} channels, but the "
            f"network of {options.run} takes {checkpoint.network.in_channels}; use data of the same kind"
        )
    if checkpoint.num_classes != len(manifest.classes):
        raise ConfigError(
            f"{join(config.data.path, options.split)} has {len(manifest.classes)} classes, but the network of "
            f"{options.run} has {checkpoint.num_classes}; use data of the same classes"
        )
    result, seen = evaluated(checkpoint, config, manifest, options)
    if options.json:
        write(options.json, result)
    as_run = config == stored.config and result["precision"] == config.train.precision
    if as_run and checkpoint.weights == config.evaluated_weights:
        keep(result, seen, options.run)
    print(table(result))


def override(config: Config, options) -> Config:
    """The run's configuration with the changes of the command line."""
    data, model, train = config.data, config.model, config.train
    if options.image_size is not None:
        # The shorter side before the central crop scales with the image size.
        resize = round(data.eval_resize * options.image_size / data.image_size)
        changed = {"image_size": options.image_size, "eval_resize": resize, "event_shift": 0}
        data = dataclasses.replace(data, **changed, image_size_start=0, image_size_ramp=())
    if options.data is not None:
        data = dataclasses.replace(data, path=options.data)
    if options.T is not None:
        model = dataclasses.replace(model, T=options.T)
    if options.precision is not None:
        tf32 = train.tf32 and options.precision == "fp32"
        train = dataclasses.replace(train, precision=options.precision, tf32=tf32)
    return dataclasses.replace(config, data=data, model=model, train=train)


def find_split(data: DataConfig, split: str) -> Manifest:
    """The manifest of a split; where a local folder has others, the error names them."""
    path, folder = data.path, join(data.path, split)
    if not is_remote(path) and not (Path(folder) / MANIFEST_NAME).is_file():
        others = sorted(file.parent.name for file in Path(path).glob(f"*/{MANIFEST_NAME}"))
        if others:
            raise ConfigError(f"{path} has no split {split!r}; use --split {' or '.join(others)}")
        raise ConfigError(f"no shard set in {folder} (no {MANIFEST_NAME}); name the folder of one with --data DIR")
    manifest = load_manifest(data, split)
    if manifest.num_samples == 0:
        raise DataError(f"{folder} holds no samples; make the shards again")
    return manifest


def check_classes(manifest: Manifest, trained_on: list[str] | None, path: str) -> None:
    """Refuses data whose labels mean something else than in training. Older runs have no record of their classes."""
    if trained_on is None or list(manifest.classes) == trained_on:
        return
    what = differing(manifest.classes, tuple(trained_on), "the run was trained on")
    raise ConfigError(f"{join(path, manifest.split)} has {what}; use data of the same classes")


def evaluated(checkpoint: "Trained", config: Config, manifest: Manifest, options) -> tuple[dict, dict]:
    """Runs the network over the split; the result and what was seen of its spikes, as they are written to JSON."""
    import torch

    from pipeline.data.loader import evaluation_batches
    from pipeline.engine import load_network
    from pipeline.engine.evaluate import evaluate_in_detail
    from pipeline.engine.insight.spikes import Spikes
    from pipeline.ranks import arithmetic
    from pipeline.ranks.cores import cores_per_rank
    from pipeline.snn.neurons import bind

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(cores_per_rank())
    precision = config.train.precision
    if precision == "fp16" and device.type == "cpu" and options.precision is None:
        print(
            "fp16 is slow on a CPU: fp32 is used, and the result is not kept with the run; --precision fp16 computes "
            "as the run did",
            file=sys.stderr,
        )
        precision = "fp32"
    arithmetic.choose(config.train)
    network = checkpoint.network.to(device)
    load_network.cast(network, precision)
    neurons = bind(network)
    neurons.widths.copy_(checkpoint.widths)
    neurons.amplitudes.copy_(checkpoint.amplitudes)
    spikes = Spikes(neurons, T=config.model.T, keeps=True)
    total, began = manifest.num_samples, time.monotonic()
    where = f"{join(config.data.path, options.split)}: {total} samples, {precision} on {device.type}"
    print(f"evaluating {options.run} after step {checkpoint.step} on {where}", file=sys.stderr, flush=True)
    said_at = began

    def said(done: int) -> None:
        nonlocal said_at
        if time.monotonic() - said_at >= PAUSE_S:
            said_at = time.monotonic()
            rate = done / (said_at - began)
            print(f"{done} of {total} samples, {rate:.0f} a second", file=sys.stderr, flush=True)

    num_batches = -(-total // config.data.micro_batch)
    with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
        detail = evaluate_in_detail(
            network,
            evaluation_batches(config.data, rank=0, world_size=1, device=device, split=options.split, T=config.model.T),
            num_classes=checkpoint.num_classes,
            measure_every=max(1, num_batches * config.data.micro_batch // MEASURED),
            said=said,
            see=spikes.samples.see,
        )
        spikes.look(network)
    seen = spikes.document(
        step=checkpoint.step, weights=checkpoint.weights, split=options.split, classes=manifest.shown
    )
    result = {
        "run": str(options.run),
        "step": checkpoint.step,
        "weights": checkpoint.weights,
        "data": config.data.path,
        "split": options.split,
        "data_identity": manifest.identity,
        "T": config.model.T,
        "image_size": config.data.image_size,
        "precision": precision,
        "device": device.type,
        **numbers(detail, manifest.classes, shown_names(manifest), network),
    }
    return result, seen


def shown_names(manifest: Manifest) -> list[str]:
    """The name to show for each class: its display name if there is one; two equal ones get the class name added."""
    shown = manifest.shown
    alike = Counter(shown)
    return [f"{name} ({own})" if alike[name] > 1 else name for name, own in zip(shown, manifest.classes, strict=True)]


def numbers(detail: "Detail", classes: Sequence[str], shown: Sequence[str], network) -> dict:
    """The figures of an evaluation, ready for JSON: an undefined number is null.

    Args:
        classes: names by label, as the run knows them.
        shown: the names to show for them.
    """
    confusion = detail.confusion
    counts, hits = confusion.sum(1).tolist(), confusion.diagonal().tolist()
    feeds = {id(layer.weight): layer.name for layer in network.spiking_layers()}
    neurons = {name.removesuffix(".weight"): feeds.get(id(weight)) for name, weight in network.named_parameters()}
    layers = [
        {
            "layer": layer.name,
            "macs": layer.macs,
            "acs": layer.acs,
            "input_rate_ratio": layer.input_rate,
            "energy_nanojoule": layer.picojoule / 1000,
            "neurons": neurons.get(layer.name),
            "firing_rate_ratio": detail.energy.firing_rates.get(neurons.get(layer.name) or ""),
        }
        for layer in detail.energy.layers
    ]
    return {
        "num_samples": detail.num_samples,
        "eval_accuracy_ratio": detail.accuracy,
        "eval_top5_accuracy_ratio": detail.top5,
        "eval_loss": detail.loss if math.isfinite(detail.loss) else None,
        "classes": [
            {"name": name, "display_name": text, "num_samples": count, "accuracy_ratio": hit / count if count else None}
            for name, text, count, hit in zip(classes, shown, counts, hits, strict=True)
        ],
        "confusion": confusion.tolist() if len(classes) <= SHOWN else None,
        "confused": confused(confusion, shown),
        "energy": {
            "microjoule": detail.energy.microjoule,
            "num_samples": detail.num_measured,
            "layers": layers,
        },
    }


def confused(confusion: "Tensor", classes: Sequence[str]) -> list[dict]:
    """The most frequent pairs of a class and a wrong answer, at most PAIRS of them.

    Args:
        confusion: `(K, K)`, samples by class (rows) and answer.
        classes: their K names.
    """
    totals, wrong = confusion.sum(1).tolist(), confusion.clone().fill_diagonal_(0).flatten()
    times = {at: int(wrong[at]) for at in wrong.nonzero().flatten().tolist()}
    # Among equally frequent pairs the one of the smaller class comes first; then the order of the classes decides.
    worst = sorted(times, key=lambda at: (-times[at], totals[at // len(classes)]))[:PAIRS]
    return [
        {
            "class": classes[label],
            "answered": classes[answer],
            "num_samples": times[at],
            "of_class_ratio": times[at] / totals[label],
        }
        for at in worst
        for label, answer in [divmod(at, len(classes))]
    ]


def write(path: Path, document: dict) -> None:
    try:
        run_folder.write_json(path, document)
    except OSError as error:
        if is_outage(error):
            raise
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another place") from None


def keep(result: dict, seen: dict, run: Path) -> None:
    """Writes RUN/evaluations/step-STEP-SPLIT.json, and renews RUN/report.html, which shows it.

    What was seen of the spikes is kept too, unless the run has that of a later step: of a run that was killed, or that
    an older version made, the report then shows it. Prints a line where the folder cannot be written.
    """
    from pipeline.report import report  # matplotlib is imported here

    path = run_folder.evaluation_path(run, result["step"], result["split"])
    try:
        path.parent.mkdir(exist_ok=True)
        run_folder.write_json(path, result)
        if result["split"] == EVALUATION and run_folder.spikes_step(run) < result["step"]:
            run_folder.write_json(run / "spikes.json", seen)
        if report.training_records(run):
            report.write(run)
    except OSError as error:
        print(f"{path} is not kept ({error.strerror})", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(command.run(main))
