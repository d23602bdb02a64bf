"""A run's weights as one safetensors file with a model card beside it:

python -m launch.export runs/digits digits.safetensors      writes digits.safetensors and digits.md
"""

import json
import sys
from pathlib import Path

from launch import command
from pipeline.errors import ConfigError, is_outage
from pipeline.metrics.journal import read_journal
from pipeline.run_dir import atomic, run_folder
from pipeline.run_dir.run_folder import Stored


def main(arguments: list[str]) -> None:
    parser = command.run_parser("export", "Writes a run's checkpoint as a safetensors file with a model card.")
    parser.add_argument("out", type=Path, metavar="OUT.safetensors", help="the file; OUT.md becomes its model card")
    parser.add_argument(
        "--names",
        choices=("ours", "original"),
        default="ours",
        help="names of the tensors: ours and SpikingJelly's, or the original SEW-ResNet code's [ours]",
    )
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    options = parser.parse_args(arguments)
    out, card = options.out, options.out.with_suffix(".md")
    check_place(out, card, options.force)
    stored = run_folder.read(options.run)
    original = options.names == "original"
    if original and not stored.config.model.arch.startswith("sew_"):
        raise ConfigError(
            f"--names original is not allowed with model.arch={stored.config.model.arch!r}: they are of the original "
            "SEW-ResNet code; use --names ours"
        )

    from launch import model_card
    from pipeline.engine import load_network  # torch is imported here, after everything cheap was checked
    from pipeline.snn import state_dicts

    checkpoint = load_network.load(options.run, stored.config, step=options.checkpoint, weights=options.weights)
    about = facts(stored, checkpoint.step, checkpoint.num_classes, checkpoint.weights)
    # The run's evaluation holds for the kind of weights that it evaluated, not for the other kind.
    told = checkpoint.weights == stored.config.evaluated_weights
    evaluation = run_folder.read_evaluation(options.run, checkpoint.step, "val") if told else None
    if told and evaluation is None:
        print(
            f"the card will say nothing of energy: {options.run} has no evaluation after step {checkpoint.step}; "
            f"python -m launch.evaluate {options.run} --checkpoint {checkpoint.step} makes one",
            file=sys.stderr,
        )
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
    try:
        # Neither is put in its place before both are written.
        with atomic.replacing(card) as new_card, atomic.replacing(out) as new:
            state_dicts.save_safetensors(checkpoint.network, new, metadata=metadata, original=original)
            new_card.write_text(model_card.text(stored, about, evaluation, out), encoding="utf-8")
    except OSError as error:
        if is_outage(error):
            raise
        raise ConfigError(f"{out} cannot be written ({error.strerror}); choose another place") from None
    print(f"{out}\n{card}")


def check_place(out: Path, card: Path, force: bool) -> None:
    if out.suffix != ".safetensors":
        raise ConfigError(f"{out} is not allowed as the file to write; use a name that ends in .safetensors")
    if not out.parent.is_dir():
        raise ConfigError(f"there is no folder {out.parent}; make it first")
    for path in (out, card):
        if path.exists() and not force:
            raise ConfigError(f"{path} is there already; choose another name, or replace it with --force")


def facts(stored: Stored, step: int, num_classes: int, weights: str) -> dict:
    """The metadata of the file's header, before `main` turns all but text into JSON."""
    config, about = stored.config, stored.about
    return {
        "recipe": config.recipe,
        "step": step,
        "weights": weights,
        "arch": config.model.arch,
        "T": config.model.T,
        "image_size": config.data.image_size,
        "num_classes": num_classes,
        "classes": about.get("classes"),
        "data_identity": about["data_identity"],
        "metrics": metrics(stored, step, evaluated=weights == config.evaluated_weights),
        "config": config.to_dict(),
        "versions": about["versions"],
        "commit": about["commit"],
    }


def metrics(stored: Stored, step: int, *, evaluated: bool) -> dict:
    """What the run's files say of the weights after `step`: its last training record, and its evaluation there where
    it evaluated these weights (`evaluated`)."""
    found: dict = {}
    for record in read_journal(stored.folder / "metrics.jsonl"):
        if record["step"] <= step and "train_loss" in record:
            found |= {name: record[name] for name in ("train_loss", "train_accuracy_ratio")}
        if evaluated and record["step"] == step and "eval_loss" in record:
            found |= {name: record[name] for name in ("eval_loss", "eval_accuracy_ratio")}
    evaluation = run_folder.read_evaluation(stored.folder, step, "val") if evaluated else None
    if evaluation is not None:
        found |= {name: value for name, value in evaluation.items() if name.startswith("eval_")}
        found["energy_microjoule"] = evaluation["energy"]["microjoule"]
    return found


if __name__ == "__main__":
    raise SystemExit(command.run(main))
