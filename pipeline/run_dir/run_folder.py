"""A run's folder: what it holds, and whether a run may continue in it. Standard library only.

RUN/config.json     the resolved configuration
RUN/run.json        versions, commit, seed, data identity, classes, layers
RUN/network.*       the file of a user's own network (snn/networks/own.py)
RUN/lock            held by rank 0 of the run that goes on in the folder (locks.py)
RUN/logs/           each rank's lines (rank_log.py)
RUN/metrics.jsonl   one record for each logged step (metrics/journal.py)
RUN/checkpoints/    (checkpoint_files.py)
RUN/spikes.json     what the trained network does with a few samples, for the report (engine/insight/spikes.py)
RUN/summary.json    the result; its presence means that the run has finished
RUN/report.html     the result in pictures (report/report.py)
RUN/tensorboard/, RUN/wandb/, RUN/mlflow/    the same curves for these tools (metrics/trackers.py)
RUN/profile/        where a step's time goes (engine/insight/profiler.py)
RUN/evaluations/    results of python -m launch.evaluate, by checkpoint and split
"""

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipeline.config import Config, config_json
from pipeline.config.config_json import config_of, flatten, foreign_keys
from pipeline.errors import ConfigError, is_outage
from pipeline.run_dir import atomic, code_version, outages

# May differ between the ranks of a run: each rank uses its own value, and no other rank has to know it.
OWN = frozenset(
    [
        "run_dir",
        "deepspeed_config",  # no setting that the file may hold changes a result
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
# May differ when a run is resumed: none of it changes what is computed.
FREE = OWN | {
    "chi.self_check",
    "data.max_bad_ratio",
    "train.keep_checkpoints",
    "train.log_every",
    "train.on_nonfinite",
    "train.timeout_s",
    "train.verify_every",
}
NETWORK = "network.py"
"""The copy of a user's own network in a run's folder."""
MEND = "remove the folder, or choose another --run_dir"
PACKAGES = ("torch", "deepspeed", "nvidia-dali", "webdataset", "numpy", "prometheus-client")
DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")  # DALI has a package for each CUDA version; one is installed


def admit(config: Config, world_size: int) -> dict | None:
    """Checks that `config` may run in its folder on `world_size` ranks; returns the summary if it has finished there.

    Raises:
        ConfigError: the folder holds a run of another configuration, or cannot be written.
        StoreError: its storage is gone, and did not come back.
    """
    what = f"run_dir={config.run_dir!r}"
    return outages.outlast(lambda: _admitted(config, world_size), what, was_writable=True)


def _admitted(config: Config, world_size: int) -> dict | None:
    folder = Path(config.run_dir)
    try:
        with suppress(FileNotFoundError):
            folder.stat()  # raises where the storage is gone; mkdir may say that the folder exists
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_outage(error):
            raise
        raise ConfigError(f"run_dir={config.run_dir!r} cannot be made ({error.strerror}); choose another") from None
    if not os.access(folder, os.W_OK):
        if os.statvfs(folder).f_flag & os.ST_RDONLY and os.path.exists(folder / "lock"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))
        raise ConfigError(f"run_dir={config.run_dir!r} is not writable; choose another, or change its permissions")
    stored = read_config(folder)
    if stored is not None:
        refuse_differences(config, stored)
    ranks = (_read(folder / "run.json") or {}).get("world_size", world_size)
    if config.train.sync_bn and ranks != world_size:
        raise ConfigError(
            f"train.sync_bn normalises over all ranks, so the run in {config.run_dir} needs the {ranks} that it was "
            f"started with, not world_size={world_size}; use as many, or another --run_dir"
        )
    return _read(folder / "summary.json")


def read_config(folder: Path) -> dict | None:
    """What config.json of a run's folder holds, see config/config_json.py; None if there is none."""
    return config_json.read(folder / "config.json", MEND)


def refuse_differences(config: Config, stored: dict) -> None:
    """Raises ConfigError if the run in the folder, whose config.json holds `stored`, has another configuration.

    The message names every field that differs, except those of FREE.
    """
    folder = config.run_dir
    unknown, missing = foreign_keys(stored)
    missing = [name for name in missing if name not in FREE]
    if unknown or missing:
        raise of_another_version(folder, unknown, missing)
    before, now = flatten(stored), flatten(json.loads(json.dumps(config.to_dict())))
    differing = [name for name in sorted(now.keys() - FREE) if before[name] != now[name]]
    if differing:
        ours = ", ".join(f"{name}={now[name]!r}" for name in differing)
        one = len(differing) == 1
        theirs = repr(before[differing[0]]) if one else ", ".join(f"{name}={before[name]!r}" for name in differing)
        raise ConfigError(
            f"{ours}, but the run in {folder} was started with {theirs}; use {'that value' if one else 'those values'} "
            f"to go on with it, as --resume {folder} does, or start a new run with another --run_dir, from the weights "
            f"and widths of this one with --init-from {folder}"
        )


def of_another_version(folder: str | Path, unknown: Sequence[str], missing: Sequence[str]) -> ConfigError:
    """The error of a run in `folder` that cannot continue: `config_json.foreign_keys` found these in config.json."""
    return ConfigError(
        f"{folder}/config.json is of another version: {config_json.said(unknown, missing)}; go on with the version "
        f"that wrote it (commit in {folder}/run.json), or start a new run with --recipe NAME --init-from {folder} "
        "--run_dir NEW"
    )


def refuse_other_data(config: Config, data_identity: str) -> None:
    """Raises ConfigError if the run in the folder was trained on data with another identity."""
    about = Path(config.run_dir) / "run.json"
    stored = outages.outlast(lambda: _read(about), f"run_dir={config.run_dir!r}")
    before = (stored or {}).get("data_identity", data_identity)
    if before != data_identity:
        raise ConfigError(
            f"data.path={config.data.path!r} holds other data (data_identity {data_identity[:12]}) than the run in "
            f"{config.run_dir} was started with ({before[:12]}); give it the old data, or start a run with another "
            "--run_dir"
        )


def refuse_other_network(config: Config, digest: str, folder: Path) -> None:
    """Raises ConfigError if the user's own network has other code than when the run in the folder began.

    Args:
        config: its `model.arch` names the code.
        digest: SHA-256 of the file that holds the network now.
        folder: below it lies what that file imports.
    """
    about = Path(config.run_dir) / "run.json"
    stored = outages.outlast(lambda: _read(about), f"run_dir={config.run_dir!r}") or {}
    kept, what = Path(config.run_dir) / NETWORK, ""
    if stored.get("network_sha256", digest) != digest:
        what, where = "its code", f" ({kept} holds it)" if kept.exists() else ""
    elif changed := changed_import(stored, folder):
        what, where = f"{changed}, which it imports,", ""
    if what:
        raise ConfigError(
            f"model.arch={config.model.arch!r}: {what} has changed since the run in {config.run_dir} was started; "
            f"put the old code back{where}, or start a new run with another --run_dir, from this one's weights with "
            f"--init-from {config.run_dir}"
        )


def changed_import(about: dict, folder: Path) -> Path | None:
    """The first file that a user's own network imports, and that has changed or is gone; None where there is none.

    Args:
        about: the run's run.json; of older runs, it names no such files.
        folder: below it lie these files.
    """
    for name, digest in about.get("network_imports", {}).items():
        try:
            code = (folder / name).read_bytes()
        except OSError:
            return folder / name
        if hashlib.sha256(code).hexdigest() != digest:
            return folder / name
    return None


class Stored(NamedTuple):
    """What a run's folder says about the run."""

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
    document, about = read_config(folder), _read(folder / "run.json")
    if document is None or about is None:
        raise ConfigError(f"{folder} holds no run (no config.json and run.json); name a run folder such as runs/digits")
    unknown, _ = foreign_keys(document)
    if unknown:
        found = config_json.said(unknown, [])
        raise ConfigError(f"{folder}/config.json is of another version: {found}; use the version that wrote it")
    try:
        return Stored(folder, config_of(document), about, _read(folder / "summary.json"))
    except ConfigError as error:
        raise ConfigError(f"{folder}/config.json: {error}") from None


def describe(
    config: Config,
    *,
    data_identity: str,
    classes: Sequence[str],
    layers: Sequence[str],
    num_parameters: int,
    world_size: int,
    kind: str = "images",
    network_code: bytes = b"",
    network_imports: Mapping[str, str] | None = None,
) -> None:
    """Writes config.json and run.json; of a user's own network its hash, and a copy where it is a single file.

    `kind` is that of the samples, as the manifest says; `network_imports` has the hashes of the files of the user's
    that their network imports.
    """
    folder = Path(config.run_dir)
    description = {
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
        "seed": config.train.seed,
        "kind": kind,
        "data_identity": data_identity,
        "classes": list(classes),
        "num_parameters": num_parameters,
        "world_size": world_size,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "layers": list(layers),
    }
    if network_code:
        description["network_sha256"] = hashlib.sha256(network_code).hexdigest()
        description["network_imports"] = dict(network_imports or {})
        if config.model.arch.rpartition(":")[0].endswith(".py"):
            code, kept = network_code.decode(), folder / NETWORK
            outages.outlast(partial(atomic.write, kept, code), str(kept), was_writable=True)
    for name, document in (("config.json", config.to_dict()), ("run.json", description)):
        outages.outlast(partial(write_json, folder / name, document), str(folder / name), was_writable=True)


def evaluation_path(folder: Path, step: int, split: str) -> Path:
    """Path of the evaluation of a checkpoint with the run's own settings."""
    return folder / "evaluations" / f"step-{step:08d}-{split}.json"


def read_evaluation(folder: Path, step: int, split: str) -> dict | None:
    """That evaluation, or None if there is none."""
    return _read(evaluation_path(folder, step, split))


def spikes_step(folder: Path) -> int:
    """The optimizer step of spikes.json; -1 where there is none that can be read."""
    try:
        return int(json.loads((folder / "spikes.json").read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def write_json(path: Path, document: dict) -> None:
    """Atomically, so that a kill leaves the old file or the new one."""
    atomic.write(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _read(path: Path) -> dict | None:
    return config_json.read_object(path, MEND)


def _versions() -> dict[str, str]:
    """Version by the name of each package that matters, "absent" if it is not installed."""
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
    """The commit of this file's checkout, followed by `-dirty` if it was changed. Without git, as in an image: what
    CHISPIKE_COMMIT says, or else the version of the code.
    """
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        found = done.stdout.strip() if done.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        found = ""
    return found or os.environ.get("CHISPIKE_COMMIT") or f"unknown (source {code_version.version()})"
