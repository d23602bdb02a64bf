"""A trained network as a folder that the Hugging Face hub keeps, and back.

FOLDER/model.safetensors    the weights, under our names
FOLDER/config.json          what the network is, see `config`
FOLDER/README.md            the model card, with metadata that the hub reads; load_pretrained does not
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from safetensors import SafetensorError

from pipeline.config import ModelConfig, config_json
from pipeline.errors import ConfigError, first_line, is_outage
from pipeline.snn import state_dicts
from pipeline.snn.networks.archs import TABLE
from pipeline.snn.networks.build import build
from pipeline.snn.networks.network import Network

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
FILES = (WEIGHTS, CONFIG, CARD)
INSTALL = 'pip install -c constraints.txt -e ".[export]"'
_LOG_IN = "log in by `hf auth login`"
_REPO = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def config(
    network: Network, model: ModelConfig, *, image_size: int, classes: Sequence[str], kind: str, described: str
) -> dict:
    """The content of config.json.

    Args:
        network: what `model` names.
        model: its configuration.
        image_size: H = W of the images, or of event frames, in pixels.
        classes: their names, in label order.
        kind: of the samples: images or events.
        described: how a sample becomes the network's input, in words.
    """
    return {
        "model_type": "chispike",
        "architectures": [type(network).__name__],
        "dtype": str(next(network.parameters()).dtype).removeprefix("torch."),
        "model": asdict(model),
        "in_channels": network.in_channels,
        "image_size": image_size,
        "num_labels": len(classes),
        "id2label": {str(label): name for label, name in enumerate(classes)},
        "kind": kind,
        "input": described,
    }


def load_pretrained(source: str | Path, *, revision: str | None = None) -> Network:
    """The network that lies in a folder of `launch.export --format hf`, or in a repository of the hub.

    Its weights are read by safetensors, which holds numbers alone; no code of the repository is run.

    Args:
        source: the folder, or a repository's name, OWNER/NAME, where there is no such folder.
        revision: branch, tag or commit of the repository.

    Returns:
        The network in evaluation mode, on the CPU: images `(N, C, H, W)` or event frames `(T, N, 2, H, W)` to logits
        `(T, N, K)`.

    Raises:
        ConfigError: nothing is there, or not what this version writes; the hub cannot be reached.
    """
    folder = Path(source) if Path(source).is_dir() else _download(str(source), revision)
    path = folder / CONFIG
    mend = "name a folder that launch.export --format hf wrote"
    said = config_json.read_object(path, mend)
    if said is None:
        raise ConfigError(f"{folder} holds no {CONFIG}; {mend}")
    if said.get("model_type") != "chispike":
        raise ConfigError(f"{path}: model_type={said.get('model_type')!r:.80} is not chispike; {mend}")
    model = said.get("model")
    known = {field.name for field in fields(ModelConfig)}
    unknown = sorted(set(model) - known) if isinstance(model, dict) else []
    if not isinstance(model, dict) or unknown:
        what = f"model.{unknown[0]} is not known to this version" if unknown else "model is no JSON object"
        raise ConfigError(f"{path}: {what}; install the version that wrote it")
    require_known(model.get("arch"), f"{path}: ")
    sizes = {name: said.get(name) for name in ("num_labels", "in_channels", "image_size")}
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise ConfigError(f"{path}: {name}={value!r:.80} is not allowed; use a whole number of at least 1")
    try:
        network = build(
            ModelConfig(**model),
            num_classes=sizes["num_labels"],  # pyright: ignore[reportArgumentType]
            in_channels=sizes["in_channels"],  # pyright: ignore[reportArgumentType]
            image_size=sizes["image_size"],  # pyright: ignore[reportArgumentType]
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    weights = folder / WEIGHTS
    try:
        state_dicts.load_safetensors(network.double() if said.get("dtype") == "float64" else network, weights)
    except (OSError, SafetensorError, ValueError) as error:
        if isinstance(error, OSError) and is_outage(error):
            raise
        raise ConfigError(f"{weights} cannot be loaded ({first_line(error)}); export it again") from None
    return network.eval()


def require_known(arch: object, where: str = "") -> None:
    """Raises ConfigError where `arch` is a user's own network: to load it, code of the repository would be run."""
    if arch is not None and arch not in TABLE:
        raise ConfigError(
            f"{where}model.arch={arch!r:.80} is a network of its own, which a folder of the hub cannot hold; use "
            f"one of {', '.join(TABLE)}, or --format onnx or torch_export"
        )


def _download(repo: str, revision: str | None) -> Path:
    check_repo(repo, "is no folder, and no repository of the hub")
    huggingface_hub = _library(f"loading {repo} from the Hugging Face hub")
    try:
        found = huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=[WEIGHTS, CONFIG])
    except _failures() as error:
        why, cure = _told(error, repo, revision)
        raise ConfigError(f"{repo} cannot be loaded from the Hugging Face hub ({why}); {cure}") from None
    return Path(found)


def push(folder: Path, repo: str) -> str:
    """Puts the folder's files into a repository of the hub, which is made, private, where it is not there.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: huggingface_hub is not installed, nobody is logged in, or the hub cannot be reached or refuses.
    """
    check_repo(repo, "is no repository of the hub")
    huggingface_hub = _library("--push")
    try:
        hub = huggingface_hub.HfApi()
        hub.create_repo(repo, private=True, exist_ok=True)
        made = hub.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=list(FILES))
    except _failures() as error:
        why, cure = _told(error, repo, None)
        raise ConfigError(
            f"{folder} is written, and cannot be pushed to {repo} ({why}); {cure}, then run `hf upload {repo} {folder}`"
        ) from None
    return made.commit_url


def check_repo(repo: str, otherwise: str) -> None:
    """Raises ConfigError where `repo` is no OWNER/NAME."""
    if not _REPO.fullmatch(repo):
        raise ConfigError(f"{repo!r:.200} {otherwise}; name one as OWNER/NAME")


def _library(what: str):
    try:
        import huggingface_hub
    except ImportError:
        raise ConfigError(f"{what} needs huggingface_hub, which is not installed; run: {INSTALL}") from None
    return huggingface_hub


def _failures() -> tuple[type[Exception], ...]:
    """What the library raises when the hub answers no or not at all, and where an upload breaks off."""
    from huggingface_hub import errors

    own = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, Exception)]
    return OSError, ValueError, RuntimeError, *own


def _told(error: Exception, repo: str, revision: str | None) -> tuple[str, str]:
    """Why the hub did not do it, and what to do about it, of an error whose first line may say neither."""
    from huggingface_hub import errors

    inner = error.__cause__
    why = first_line(error).removesuffix(".")
    if isinstance(inner, Exception) and isinstance(error, errors.LocalEntryNotFoundError):
        return _told(inner, repo, revision)  # it only adds that nothing of the repository is on this machine
    if isinstance(inner, Exception) and isinstance(error, RuntimeError):
        cause, cure = _told(inner, repo, revision)
        return f"{why}: {cause}", cure
    if isinstance(error, errors.GatedRepoError):
        return "it is gated", f"ask its owner for access at https://huggingface.co/{repo}, then {_LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has none of this name, or does not show it to you", f"check the name, or {_LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}", "name a branch, tag or commit of it"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return "it lacks a file", "name a repository that launch.export --push made"
    if isinstance(error, errors.HfHubHTTPError):
        refused = error.response.status_code in (401, 403)
        return why, f"{_LOG_IN} with a token that may do this" if refused else "try again later"
    if isinstance(error, (ConnectionError, errors.HTTPError)):  # pyright: ignore[reportPrivateImportUsage]
        return why, "see whether this machine reaches the hub"
    return why, "mend that"
