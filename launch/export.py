"""A run's network in a format that others read, with a model card beside it:

python -m launch.export runs/digits digits.safetensors       and digits.safetensors.md
python -m launch.export runs/digits digits.nir --format nir
python -m launch.export runs/digits digits --format hf       a folder as the Hugging Face hub keeps it

docs/export.md says what each format holds and who reads it.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from launch import command
from pipeline.data.manifest import EVENTS, IMAGES
from pipeline.errors import ConfigError, is_outage
from pipeline.metrics.journal import read_journal
from pipeline.run_dir import atomic, run_folder
from pipeline.run_dir.run_folder import Stored
from pipeline.snn.networks.archs import TABLE

if TYPE_CHECKING:
    from pipeline.engine.load_network import Trained


class Job(NamedTuple):
    """One export."""

    checkpoint: "Trained"
    stored: Stored
    about: dict
    """What the run says of these weights, see `facts`."""
    options: argparse.Namespace

    @property
    def metadata(self) -> dict[str, str]:
        """`about` as texts: what is none is JSON."""
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in self.about.items()}


class Format(NamedTuple):
    suffix: str
    """Of the file's name; empty where OUT is a folder."""
    needs: tuple[str, ...]
    """Packages that may be absent; the extra `export` brings them."""
    write: Callable[[Job, Path], None]


def main(arguments: list[str]) -> None:
    parser = command.run_parser("export", "Writes a run's network as a file that others read, with a model card.")
    parser.add_argument("out", type=Path, metavar="OUT", help="the file, with its model card beside it, or a folder")
    parser.add_argument(
        "--format", choices=FORMATS, default="safetensors", help="what to write, see docs/export.md [safetensors]"
    )
    parser.add_argument(
        "--names",
        choices=("ours", "original"),
        default="ours",
        help="names of tensors in safetensors: ours and SpikingJelly's, or the original SEW-ResNet code's [ours]",
    )
    parser.add_argument(
        "--dt", type=float, metavar="SECONDS", help="length of a time step, for --format nir only [0.0001]"
    )
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="put the folder of --format hf into this repository of the hub, too"
    )
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    options = parser.parse_args(arguments)
    check_options(options)
    check_place(options.out, options.format, options.run)
    out, card = places(options.out, options.format)
    check_free((out, card, *([] if FORMATS[options.format].suffix else [out.with_name("config.json")])), options.force)
    stored = run_folder.read(options.run)
    arch = TABLE.get(stored.config.model.arch)
    if options.names == "original" and (arch is None or arch.family != "sew"):
        raise ConfigError(
            f"--names original is not allowed with model.arch={stored.config.model.arch!r}: they are of the original "
            "SEW-ResNet code; use --names ours"
        )
    if options.format == "hf" and stored.config.model.is_own:
        raise ConfigError(
            "--format hf is not allowed for a network of your own, whose code the folder would lack; use --format "
            "torch_export or onnx"
        )

    from launch import model_card
    from pipeline.engine import load_network  # torch is imported here, after everything cheap was checked
    from pipeline.snn.exchange import hub

    if options.push is not None:
        hub.check_repo(options.push, "is no repository of the hub")
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
    try:
        out.parent.mkdir(exist_ok=True)
        # Neither is put in its place before both are written.
        with atomic.replacing(card) as new_card, atomic.replacing(out) as new:
            FORMATS[options.format].write(Job(checkpoint, stored, about, options), new)
            new_card.write_text(model_card.text(stored, about, evaluation, out, options.format), encoding="utf-8")
    except OSError as error:
        if is_outage(error):
            raise
        raise ConfigError(f"{out} cannot be written ({error.strerror}); choose another place") from None
    print(f"{out}\n{card}")
    if options.push is not None:
        print(hub.push(options.out, options.push))


def check_options(options: argparse.Namespace) -> None:
    """Raises ConfigError for an option that the format does not have, or if a package that it needs is absent."""
    if options.names != "ours" and options.format != "safetensors":
        raise ConfigError(f"--names {options.names} is not allowed with --format {options.format}; leave it out")
    if options.dt is not None and options.format != "nir":
        raise ConfigError(f"--dt {options.dt:g} is not allowed with --format {options.format}; leave it out")
    if options.push is not None and options.format != "hf":
        raise ConfigError(f"--push {options.push} is not allowed with --format {options.format}; use --format hf")
    needs = FORMATS[options.format].needs + (("huggingface_hub",) if options.push is not None else ())
    absent = [name for name in needs if importlib.util.find_spec(name) is None]
    if absent:
        asked = "--push" if options.push is not None else f"--format {options.format}"
        raise ConfigError(
            f'{asked} needs {", ".join(absent)}, not installed; run: pip install -c constraints.txt -e ".[export]"'
        )


def check_place(out: Path, format: str, run: Path) -> None:
    suffix = FORMATS[format].suffix
    if suffix and out.suffix != suffix:
        raise ConfigError(
            f"{out} is not allowed as the file to write with --format {format}; use a name that ends in {suffix}"
        )
    if not suffix and out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; --format {format} writes a folder: choose another name")
    if not suffix and out.resolve() == run.resolve():
        raise ConfigError(f"{out} is the run's own folder, whose config.json would be replaced; choose another name")
    if not out.parent.is_dir():
        raise ConfigError(f"there is no folder {out.parent}; make it first")


def places(out: Path, format: str) -> tuple[Path, Path]:
    """The file of the weights and the model card."""
    if FORMATS[format].suffix:
        return out, out.with_name(f"{out.name}.md")
    return out / "model.safetensors", out / "README.md"


def check_free(paths: tuple[Path, ...], force: bool) -> None:
    for path in paths:
        if path.exists() and not force:
            raise ConfigError(f"{path} is there already; choose another name, or replace it with --force")


def _safetensors(job: Job, new: Path) -> None:
    from pipeline.snn import state_dicts

    original = job.options.names == "original"
    state_dicts.save_safetensors(job.checkpoint.network, new, metadata=job.metadata, original=original)


def _nir(job: Job, new: Path) -> None:
    import nir

    from pipeline.snn.exchange import nir_graph

    graph = nir_graph.from_network(
        job.checkpoint.network,
        image_size=job.stored.config.data.image_size,
        dt=nir_graph.DT if job.options.dt is None else job.options.dt,
        event_frames=job.about["kind"] == EVENTS,
        about=job.metadata,
    )
    nir.write(new, graph)


def _onnx(job: Job, new: Path) -> None:
    from pipeline.snn.exchange import programs

    programs.save_onnx(new, job.checkpoint.network, **_input(job), about=job.metadata)


def _torch_export(job: Job, new: Path) -> None:
    from pipeline.snn.exchange import programs

    programs.save_program(new, programs.program(job.checkpoint.network, **_input(job)), job.metadata)


def _input(job: Job) -> dict:
    """What the network gets, as arguments of `programs.program`."""
    config = job.stored.config
    return {
        "in_channels": job.checkpoint.network.in_channels,
        "image_size": config.data.image_size,
        "num_frames": config.model.T if job.about["kind"] == EVENTS else None,
    }


def _hf(job: Job, new: Path) -> None:
    from pipeline.snn import state_dicts
    from pipeline.snn.exchange import hub

    network, run = job.checkpoint.network, job.stored.config
    hub.require_known(run.model.arch)
    classes = job.about["classes"] or [str(label) for label in range(job.checkpoint.num_classes)]
    said = hub.config(
        network,
        run.model,
        image_size=run.data.image_size,
        classes=classes,
        kind=job.about["kind"],
        described=job.about["input"],
    )
    state_dicts.save_safetensors(network, new, metadata=job.metadata)
    atomic.write(new.with_name("config.json"), json.dumps(said, indent=2, ensure_ascii=False) + "\n")


FORMATS = {
    "safetensors": Format(".safetensors", (), _safetensors),
    "nir": Format(".nir", ("nir",), _nir),
    "onnx": Format(".onnx", ("onnx", "onnxscript"), _onnx),
    "torch_export": Format(".pt2", (), _torch_export),
    "hf": Format("", (), _hf),
}


def facts(stored: Stored, step: int, num_classes: int, weights: str) -> dict:
    """The metadata of the file's header, before `main` turns all but text into JSON."""
    from launch import model_card  # torch is imported here

    config, about = stored.config, stored.about
    return {
        "recipe": config.recipe,
        "step": step,
        "weights": weights,
        "arch": config.model.arch,
        "T": config.model.T,
        "image_size": config.data.image_size,
        "kind": about.get("kind", IMAGES),  # runs of before there was event data do not say
        "input": model_card.input_of(stored),
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
