"""The model card beside exported weights: Markdown, written from what the run's folder says."""

import dataclasses
import json
from pathlib import Path

from launch.evaluation_table import percent, shown
from pipeline.config import DataConfig, ModelConfig
from pipeline.data.decode.dali_pipeline import MEAN, STD
from pipeline.data.manifest import EVENT_CHANNELS, EVENTS, IMAGE_CHANNELS
from pipeline.metrics.journal import read_journal
from pipeline.run_dir.run_folder import Stored

LISTED = 40  # most classes in the card; the file's header has all
NEURONS = {"if": "IF", "lif": "LIF", "plif": "PLIF"}
_FIELDS = {field.name: field.default for field in dataclasses.fields(ModelConfig)}


def text(stored: Stored, about: dict, evaluation: dict | None, weights: Path, format: str = "safetensors") -> str:
    """The card of `weights`.

    Args:
        stored: the run.
        about: what the file's header says, see `launch.export`.
        evaluation: of these weights on the validation split, by `launch.evaluate`; None where there is none.
        weights: the file that was written.
        format: of that file, a name in `launch.export.FORMATS`.
    """
    model = stored.config.model
    layers = len(stored.about["layers"])
    sections = [
        f"# {about['recipe']}: {model.arch}, T = {model.T}",
        f"A spiking network for {'event data' if _holds_events(stored) else 'images'}, trained with chispike: {layers} "
        f"layers of {'' if model.is_own else NEURONS[model.neuron] + ' '}neurons, "
        f"{stored.about['num_parameters']:,} parameters, {about['num_classes']} classes. "
        f"{'Moving average of the weights' if about['weights'] == 'ema' else 'Weights'} after optimizer step "
        f"{about['step']}.",
        "## Result\n" + _result(stored, about["metrics"], evaluation),
        "## To load it\n" + _LOADING[format](stored, about, weights),
        f"## {'Frames' if _holds_events(stored) else 'Images'}\n" + input_of(stored),
        "## Classes\n" + classes_of(about, evaluation),
        "## Layers\n" + _layers(stored, about["step"], evaluation),
        "## Training\n" + _training(stored, about),
        "## Configuration\n```json\n" + json.dumps(about["config"], indent=2, ensure_ascii=False) + "\n```",
    ]
    metadata = [_metadata(stored, about)] if format == "hf" else []
    return "\n\n".join(metadata + sections) + "\n"


def _metadata(stored: Stored, about: dict) -> str:
    """What the Hugging Face hub reads at the head of a card: YAML, whose values are written as JSON.

    None of its tasks is for event data.
    """
    task, of = ("other", "event-camera") if _holds_events(stored) else ("image-classification", "image-classification")
    said: dict = {
        "library_name": "chispike",
        "pipeline_tag": task,
        "tags": ["spiking-neural-network", of, about["arch"]],
    }
    metrics = about["metrics"]
    if "eval_loss" in metrics:
        found = [{"type": "accuracy", "name": "top-1", "value": metrics["eval_accuracy_ratio"]}]
        data = {"name": about["recipe"], "type": about["recipe"], "split": "validation"}
        result = {"task": {"type": task}, "dataset": data, "metrics": found}
        said["model-index"] = [{"name": f"{about['recipe']}-{about['arch']}", "results": [result]}]
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in said.items()]
    return "\n".join(["---", *lines, "---"])


def _rows(*rows: list) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _result(stored: Stored, metrics: dict, evaluation: dict | None) -> str:
    rows = [["", ""]]
    if "eval_loss" in metrics:
        rows.append(["validation accuracy, top-1", percent(metrics["eval_accuracy_ratio"])])
        if metrics.get("eval_top5_accuracy_ratio") is not None:
            rows.append(["validation accuracy, top-5", percent(metrics["eval_top5_accuracy_ratio"])])
        rows.append(["validation loss, nats", _number(metrics["eval_loss"], 4)])
    else:
        rows.append(["validation", "not evaluated after this step"])
    if evaluation is not None:
        rows.append(["validation samples, each once", evaluation["num_samples"]])
        rows.append(["computed in", f"{evaluation['precision']} on {evaluation['device']}"])
        sample = "a recording" if _holds_events(stored) else "an image"
        rows.append([f"energy {sample}, estimated for 45 nm", f"{metrics['energy_microjoule']:.3f} µJ"])
    if "train_loss" in metrics:
        rows.append(["training loss of the last logged batch, nats", _number(metrics["train_loss"], 4)])
    return _rows(*rows)


def _holds_events(stored: Stored) -> bool:
    return stored.about.get("kind") == EVENTS  # runs of before there was event data do not say


def _given(stored: Stored) -> tuple[str, str]:
    """The name and the shape of the network's input, in the lines that load it."""
    size = stored.config.data.image_size
    if _holds_events(stored):
        return "frames", f"({stored.config.model.T}, N, {EVENT_CHANNELS}, {size}, {size})"
    return "images", f"(N, {IMAGE_CHANNELS}, {size}, {size})"


def _loading(stored: Stored, about: dict, weights: Path) -> str:
    model, (name, shape) = stored.config.model, _given(stored)
    network = f"num_classes={about['num_classes']}, image_size={stored.config.data.image_size}"
    if _holds_events(stored):
        network += f", in_channels={EVENT_CHANNELS}"
    names = ["arch", "T", "connect", "neuron", "v_th", "reset", *(["tau"] if model.neuron != "if" else [])]
    own = ""
    if model.is_own:  # it may use any of the model's options
        names = [name for name, default in _FIELDS.items() if name == "T" or getattr(model, name) != default]
        digest = stored.about["network_sha256"]
        imports = "".join(f", {name} {sha}" for name, sha in stored.about.get("network_imports", {}).items())
        also = f"; it imports{imports[1:]}" if imports else ""
        own = f"""
The network is code of its own: {model.arch.rpartition(":")[0]}, with the SHA-256 {digest}{also}.
"""
    settings = ", ".join(f"{name}={getattr(model, name)!r}" for name in names)
    return f"""```python
from pipeline.config import ModelConfig
from pipeline.snn import state_dicts
from pipeline.snn.networks.build import build
network = build(ModelConfig({settings}), {network}).eval()
state_dicts.load_safetensors(network, {weights.name!r})
logits = network({name}).mean(0)  # {name} {shape} → (N, {about["num_classes"]})
```{own}"""


def _loading_nir(stored: Stored, about: dict, weights: Path) -> str:
    name, shape = _given(stored)
    fed = "Each frame is the input of one of" if _holds_events(stored) else "An image is the input of all"
    return f"""```python
from pipeline.snn.exchange import nir_network
network = nir_network.load({weights.name!r})
logits = network({name}).mean(0)  # {name} {shape} → (N, {about["num_classes"]})
```
Other simulators: SpikingJelly's `nir_exchange.import_from_nir`, snnTorch's `import_from_nir` for leaky neurons. {fed}
{about["T"]} time steps, and the logits are the mean over them; batch normalisation is folded into the convolutions."""


def _loading_onnx(stored: Stored, about: dict, weights: Path) -> str:
    name, shape = _given(stored)
    return f"""```python
import onnxruntime
session = onnxruntime.InferenceSession({weights.name!r})
# {name} {shape} fp32 → (N, {about["num_classes"]}), the mean over {about["T"]} time steps
logits = session.run(["logits"], {{"{name}": {name}.numpy()}})[0].mean(0)
```{_fixed(stored)}"""


def _loading_torch_export(stored: Stored, about: dict, weights: Path) -> str:
    name, shape = _given(stored)
    return f"""```python
import torch
network = torch.export.load({weights.name!r}).module()
# {name} {shape} → (N, {about["num_classes"]}), the mean over {about["T"]} time steps
logits = network({name}).mean(0)
```
Nothing of chispike is needed.{_fixed(stored)}"""


def _fixed(stored: Stored) -> str:
    """What a program says of T, where that is a size of its input."""
    if not _holds_events(stored):
        return ""
    return f"\nN may be any number. T may not: the steps are unrolled, and {stored.config.model.T} frames are taken."


def _loading_hf(stored: Stored, about: dict, weights: Path) -> str:
    name, shape = _given(stored)
    return f"""```python
from pipeline.snn.exchange.hub import load_pretrained
network = load_pretrained(".")  # this folder, or OWNER/NAME of a repository of the hub
logits = network({name}).mean(0)  # {name} {shape} → (N, {about["num_classes"]})
```"""


_LOADING = {
    "safetensors": _loading,
    "nir": _loading_nir,
    "onnx": _loading_onnx,
    "torch_export": _loading_torch_export,
    "hf": _loading_hf,
}


def input_of(stored: Stored) -> str:
    """How an image, or a recording of events, becomes the network's input."""
    data = stored.config.data
    if _holds_events(stored):
        return _frames(data, stored.config.model.T)
    return (
        f"RGB; the shorter side resized to {data.eval_resize or data.image_size} pixels, the central square of "
        f"{data.image_size} cut out. Of 8-bit levels, the mean {MEAN} of each channel is taken away and the "
        f"rest divided by {STD}. The same image is shown at every time step."
    )


def _frames(data: DataConfig, T: int) -> str:
    cut, theirs = ("duration", "time") if data.event_frames == "time" else ("number of events", "number")
    return (
        f"Event recordings, cut into {T} frames of the same {cut}, as by SpikingJelly's split_by={theirs!r}; what the "
        f"division leaves over belongs to the last. A frame has {data.image_size} x {data.image_size} cells; the "
        "longer side of the sensor fills it, the shorter one is centred, and a cell counts the events of its pixels: "
        "channel 0 those that became darker, channel 1 those that became brighter. Counts are not normalised. Each "
        "frame is shown at one time step."
    )


def classes_of(about: dict, evaluation: dict | None) -> str:
    """The classes by label, each with its display name where that is another."""
    names = about["classes"] or (evaluation and [kind["name"] for kind in evaluation["classes"]])
    if not names:
        return f"{about['num_classes']}; their names are in the manifest of the data."
    rest = f"\n\n{len(names) - LISTED} more are in the file's header." if len(names) > LISTED else ""
    if evaluation is None:
        return _rows(["label", "class"], *([i, name] for i, name in enumerate(names[:LISTED]))) + rest
    kinds = enumerate(evaluation["classes"][:LISTED])
    rows = [[i, _called(kind), kind["num_samples"], percent(kind["accuracy_ratio"])] for i, kind in kinds]
    return _rows(["label", "class", "validation samples", "right"], *rows) + rest


def _called(kind: dict) -> str:
    return kind["name"] if shown(kind) == kind["name"] else f"{kind['name']}: {shown(kind)}"


def _layers(stored: Stored, step: int, evaluation: dict | None) -> str:
    journal = read_journal(stored.folder / "metrics.jsonl")
    logged = [record for record in journal if "train_loss" in record and record["step"] <= step]
    nothing = [None] * len(stored.about["layers"])
    last = logged[-1] if logged else {"layer_surrogate_width": nothing, "layer_firing_rate_ratio": nothing}
    operations = {layer["neurons"]: layer for layer in evaluation["energy"]["layers"]} if evaluation else {}
    rows = [["neurons", "surrogate's width", "firing rate, training", "firing rate, validation", "energy, nJ"]]
    for name, width, rate in zip(
        stored.about["layers"], last["layer_surrogate_width"], last["layer_firing_rate_ratio"], strict=True
    ):
        found = operations.get(name, {"firing_rate_ratio": None, "energy_nanojoule": None})
        rates = [_number(value, 4) for value in (width, rate, found["firing_rate_ratio"])]
        rows.append([name, *rates, _number(found["energy_nanojoule"], 1)])
    if not evaluation:
        return _rows(*rows)
    energy = evaluation["energy"]
    return _rows(*rows) + (
        f"\n\nMeans of {energy['num_samples']} validation samples. Energy is of the convolution that feeds the "
        "neurons, 0.9 pJ an accumulation and 4.6 pJ a multiply-accumulate; the total has the last layer's too."
    )


def _training(stored: Stored, about: dict) -> str:
    config, run = stored.config, stored.about
    chi = config.chi
    steered = (
        chi.policy if chi.policy != "chi" else f"{chi.indicator} held at {chi.target:g}, at the end {chi.target_end:g}"
    )
    return _rows(
        ["", ""],
        ["recipe", about["recipe"]],
        ["data", f"{config.data.path}, manifest of the training split {about['data_identity']}"],
        ["epochs, batch", f"{config.train.epochs:g}, {config.data.global_batch}"],
        ["learning rate, momentum", f"{config.optim.lr:g}, {config.optim.momentum:g}"],
        ["surrogate", f"{config.model.surrogate}; {steered}"],
        ["precision, ranks, seed", f"{config.train.precision}, {run['world_size']}, {run['seed']}"],
        ["commit", about["commit"]],
        ["versions", ", ".join(f"{name} {version}" for name, version in about["versions"].items())],
    )
