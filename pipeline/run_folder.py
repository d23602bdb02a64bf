"""The run's folder: what it holds, whether a run may go on in it. Nothing but the standard library.

RUN/config.json     the resolved configuration
RUN/run.json        versions, commit, seed, data identity, classes, layers
RUN/lock            held by rank 0 of the run that goes on in the folder (run_lock.py)
RUN/logs/           each rank's lines (rank_log.py)
RUN/metrics.jsonl   one record a logged step (metrics.py)
RUN/checkpoints/    (checkpoint.py)
RUN/summary.json    the result; its presence means that the run has finished
RUN/report.html     the result in pictures (report.py)
RUN/tensorboard/, RUN/wandb/, RUN/mlflow/    the same curves for these (trackers.py)
RUN/profile/        where a step's time goes (step_trace.py)
RUN/evaluations/    what python -m launch.evaluate found, by checkpoint and split
"""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline import source
from pipeline.config import Config
from pipeline.errors import ConfigError

# What may differ between the ranks of a run: each acts on its own, and none waits for another because of it.
OWN = frozenset(
    [
        "run_dir",
        "deepspeed_config",  # nothing that the file may hold changes a result
        "data.path",  # the data themselves are compared, by their manifest's hash
        "data.cache_dir",
        "data.cache_bytes",
        "data.prefetch",
        "data.retries",
        "data.threads",
        "data.timeout_s",
        "metrics.host",
        "metrics.mlflow",
        "metrics.port",
        "metrics.tls_cert",
        "metrics.tls_client_ca",
        "metrics.tls_key",
        "metrics.tensorboard",
        "metrics.wandb",
        "train.profile_steps",
    ]
)
# What may differ when a run is started again: none of it changes what is computed.
FREE = OWN | {
    "chi.self_check",
    "data.max_bad_ratio",
    "train.keep_checkpoints",
    "train.log_every",
    "train.on_nonfinite",
    "train.timeout_s",
    "train.verify_every",
}
PACKAGES = ("torch", "deepspeed", "nvidia-dali", "webdataset", "numpy", "prometheus-client")
DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")  # DALI has a name for each CUDA, and one of them is installed


def flatten(config: dict, prefix: str = "") -> dict[str, object]:
    """`{"data": {"path": p}}` as `{"data.path": p}`."""
    flat = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def admit(config: Config, world_size: int) -> dict | None:
    """Checks that `config` may run in its folder on so many ranks; the summary where it has finished there already.

    Raises:
        ConfigError: the folder holds a run of another configuration, or cannot be written.
    """
    folder = Path(config.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir={config.run_dir!r} cannot be made ({error.strerror}); choose another") from None
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"run_dir={config.run_dir!r} is not writable; choose another, or change its permissions")
    stored = _read(folder / "config.json")
    if stored is not None:
        before, now = flatten(stored), flatten(json.loads(json.dumps(config.to_dict())))
        for name in sorted((before.keys() | now.keys()) - FREE):
            if before.get(name) != now.get(name):
                raise ConfigError(
                    f"{name}={now.get(name)!r}, but the run in {config.run_dir} was started with "
                    f"{before.get(name)!r}; use that value to go on with it, or another --run_dir"
                )
    ranks = (_read(folder / "run.json") or {}).get("world_size", world_size)
    if config.train.sync_bn and ranks != world_size:
        raise ConfigError(
            f"train.sync_bn normalises over all ranks, so the run in {config.run_dir} needs the {ranks} that it was "
            f"started with, not world_size={world_size}; use as many, or another --run_dir"
        )
    return _read(folder / "summary.json")


def refuse_other_data(config: Config, data_identity: str) -> None:
    """Raises ConfigError where the run in the folder was trained on other data than those with this identity."""
    before = (_read(Path(config.run_dir) / "run.json") or {}).get("data_identity", data_identity)
    if before != data_identity:
        raise ConfigError(
            f"data.path={config.data.path!r} holds other data (data_identity {data_identity[:12]}) than the run in "
            f"{config.run_dir} was started with ({before[:12]}); give it the old data, or start a run with another "
            "--run_dir"
        )


class Stored(NamedTuple):
    """What a run's folder says of it."""

    folder: Path
    config: Config
    about: dict
    """run.json, see `describe`."""
    summary: dict | None
    """summary.json; None where the run has not finished."""


def read(folder: Path) -> Stored:
    """The run in `folder`, finished or not.

    Raises:
        ConfigError: there is none, or it was written by another version of this program.
    """
    config, about = _read(folder / "config.json"), _read(folder / "run.json")
    if config is None or about is None:
        raise ConfigError(f"{folder} holds no run (no config.json and run.json); name a run folder such as runs/digits")
    try:
        return Stored(folder, _config(Config, config), about, _read(folder / "summary.json"))
    except TypeError as error:
        raise ConfigError(f"{folder}/config.json is not of this version ({error})") from None


def _config(kind: type, document: dict):
    """`to_dict`'s inverse; fields that came after the document was written take their defaults."""
    defaults = {field.name: field.default_factory for field in fields(kind)}
    sections = {
        name: _config(defaults[name], value)  # pyright: ignore[reportArgumentType]
        for name, value in document.items()
        if is_dataclass(defaults.get(name))
    }
    return kind(**{**document, **sections})


def describe(
    config: Config,
    *,
    data_identity: str,
    classes: Sequence[str],
    layers: Sequence[str],
    num_parameters: int,
    world_size: int,
) -> None:
    """Writes config.json and run.json."""
    folder = Path(config.run_dir)
    description = {
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
        "seed": config.train.seed,
        "data_identity": data_identity,
        "classes": list(classes),
        "num_parameters": num_parameters,
        "world_size": world_size,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "layers": list(layers),
    }
    write_json(folder / "config.json", config.to_dict())
    write_json(folder / "run.json", description)


def evaluation_path(folder: Path, step: int, split: str) -> Path:
    """Where the evaluation of a checkpoint with the run's own settings lies."""
    return folder / "evaluations" / f"step-{step:08d}-{split}.json"


def read_evaluation(folder: Path, step: int, split: str) -> dict | None:
    """That evaluation, or None where nobody has made it."""
    return _read(evaluation_path(folder, step, split))


def write_json(path: Path, document: dict) -> None:
    """Atomically, so that a kill leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); change its permissions") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); remove the folder, or choose another --run_dir") from None


def _versions() -> dict[str, str]:
    """Version by the name of each package that matters, "absent" where it is not installed."""
    found = {}
    for package in PACKAGES:
        for name in DALI if package == "nvidia-dali" else (package,):
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            break
        else:
            found[package] = "absent"
    return found


def _commit() -> str:
    """The commit of the checkout that this file lies in, `-dirty` behind it where it was changed; without git, as in an
    image, what CHISPIKE_COMMIT says, or at least which code it is.
    """
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        found = done.stdout.strip() if done.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        found = ""
    return found or os.environ.get("CHISPIKE_COMMIT") or f"unknown (source {source.version()})"
