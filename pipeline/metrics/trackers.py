"""The journal's records in TensorBoard, Weights & Biases or MLflow, through their own libraries. Rank 0 only.

Each writes files below the run's folder and talks to no server: RUN/tensorboard, RUN/wandb (`wandb sync` sends it),
RUN/mlflow (`mlflow ui --backend-store-uri sqlite:///RUN/mlflow/mlflow.db`). They hold what the journal holds: a
resumed run writes them anew from its journal, which has every step once, and goes on.
"""

import importlib.util
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from pipeline.config import Config
from pipeline.config.config_json import flatten
from pipeline.errors import ConfigError
from pipeline.metrics.journal import layer_labels

EXTRAS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}
"""Package by option; library and extra have the option's name."""


class Tracker(Protocol):
    def write(self, step: int, values: dict[str, float], at_s: float | None) -> None: ...
    def close(self) -> None: ...


def require(config: Config) -> None:
    """Raises ConfigError if the library of a configured tracker is absent; loads no library."""
    for name, package in EXTRAS.items():
        if getattr(config.metrics, name) and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"metrics.{name}=True needs {package}, which is not installed; run: "
                f'pip install -c constraints.txt -e ".[{name}]"'
            )


class Trackers:
    """The trackers that `config.metrics` asks for.

    Args:
        config: of the run; its folder is where they write.
        layers: names of the spiking layers, for values that come by layer.
        earlier: the journal's records so far.
    """

    def __init__(self, config: Config, layers: Sequence[str], earlier: Iterable[dict]) -> None:
        require(config)
        self._labels, self._last_s = layer_labels(layers), None
        kinds = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
        self._trackers: list[Tracker] = []
        for name, kind in kinds.items():
            folder = Path(config.run_dir) / name
            if getattr(config.metrics, name):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                self._trackers.append(kind(folder, config))
        if self._trackers:
            for record in earlier:
                self.write(record)

    def write(self, record: dict) -> None:
        """Writes a record of the journal: its numbers, and its numbers by layer."""
        values = dict(numbers(record, self._labels))
        self._last_s = record.get("train_last_step_timestamp_seconds", self._last_s)
        for tracker in self._trackers if values else ():
            tracker.write(record["step"], values, self._last_s)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def numbers(record: dict, labels: Sequence[str]) -> Iterator[tuple[str, float]]:
    """A record's values by the name of their curve: `train_loss`, and `layer_chi/00-sn1` for each layer."""
    for name, value in record.items():
        if name.startswith("layer_"):
            yield from ((f"{name}/{label}", x) for label, x in zip(labels, value, strict=True) if x is not None)
        elif name not in ("step", "train_last_step_timestamp_seconds") and isinstance(value, (int, float)):
            yield name, value


class TensorBoard:
    def __init__(self, folder: Path, config: Config) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))
        rows = [f"| {name} | {value} |" for name, value in flatten(config.to_dict()).items()]
        self._writer.add_text("configuration", "\n".join(["| | |", "|---|---|", *rows]), 0)

    def write(self, step: int, values: dict[str, float], at_s: float | None) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=at_s)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    def __init__(self, folder: Path, config: Config) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # pyright: ignore[reportMissingImports]

        self._library = wandb
        self._run = wandb.init(
            project="chispike",
            name=Path(config.run_dir).name,
            dir=str(folder.parent),
            mode="offline",
            config=flatten(config.to_dict()),
            settings=wandb.Settings(console="off", x_disable_stats=True),
        )

    def write(self, step: int, values: dict[str, float], at_s: float | None) -> None:
        # A step stays open until the next one, so an evaluation after it joins it.
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()
        self._library.teardown()  # what was logged is on the disk when it returns


class MLflow:
    def __init__(self, folder: Path, config: Config) -> None:
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        for talker in ("mlflow", "alembic"):  # else they log every table that they make
            logging.getLogger(talker).setLevel(logging.WARNING)
        self._client = MlflowClient(tracking_uri=f"sqlite:///{folder.absolute()}/mlflow.db")
        experiment = self._client.create_experiment(
            "chispike", artifact_location=(folder / "files").absolute().as_uri()
        )
        self._id = self._client.create_run(experiment, run_name=Path(config.run_dir).name).info.run_id
        for name, value in flatten(config.to_dict()).items():
            self._client.log_param(self._id, name, value)

    def write(self, step: int, values: dict[str, float], at_s: float | None) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        at_ms = round(1000 * (at_s or 0))
        metrics = [Metric(name, value, at_ms, step) for name, value in values.items()]
        for first in range(0, len(metrics), 1000):  # the most that one call takes
            self._client.log_batch(self._id, metrics[first : first + 1000])

    def close(self) -> None:
        self._client.set_terminated(self._id)
