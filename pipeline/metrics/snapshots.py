"""The metrics of a node's processes: each writes a snapshot, a file; `Families` joins the snapshots for Prometheus.

The snapshot of a process that died stays, so that its last step can be seen. Needs only prometheus-client and the
standard library.
"""

import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from pipeline.metrics.catalogue import METRICS
from pipeline.run_dir import atomic

log = logging.getLogger(__name__)


class Snapshot:
    """What one process shows: values set or added up, and written to `FOLDER/SOURCE.json` by `write`.

    Args:
        folder: on a local disk or in memory; every process of the node writes there.
        source: name of the process, such as rank-0; one process at a time.
        labels: values of labels, `run` among them. A series carries those that its metric has.
    """

    def __init__(self, folder: Path, source: str, **labels: str) -> None:
        self._path, self._labels = folder / f"{source}.json", labels
        self._values: dict[str, dict[tuple[str, ...], float]] = {}
        self._warned = self._written = False
        self._lock = threading.Lock()  # a checkpoint may be written, and counted, beside the loop

    def set(self, name: str, value: float, **labels: str) -> None:
        with self._lock:
            self._values.setdefault(name, {})[self._key(name, labels)] = value

    def add(self, name: str, increment: float = 1.0, **labels: str) -> None:
        """Adds to a counter, which begins at 0; a negative increment adds 0. An increment of 0 creates the series."""
        with self._lock:
            series, key = self._values.setdefault(name, {}), self._key(name, labels)
            series[key] = series.get(key, 0.0) + max(0.0, increment)

    def _key(self, name: str, labels: dict[str, str]) -> tuple[str, ...]:
        labels = self._labels | labels
        return tuple(labels[label] for label in ("run", *METRICS[name].labels))

    def write(self) -> None:
        """Replaces the file at once. Metrics never end a run: what cannot be written is said once, and left."""
        with self._lock:
            values = {name: [[*key, value] for key, value in series.items()] for name, series in self._values.items()}
            try:
                atomic.write(self._path, json.dumps(values))
                self._written = True
            except OSError as error:
                left = self._written and isinstance(error, FileNotFoundError)  # the server ended with the run
                if not self._warned and not left:
                    log.warning("%s cannot be written (%s); the metrics stand still", self._path, error.strerror)
                self._warned = True


class Families(Collector):
    """The snapshots of a folder, put together by metric."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._warned: set[str] = set()

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        snapshots = list(self._snapshots())
        for name, metric in METRICS.items():
            rows = [row for snapshot in snapshots for row in snapshot.get(name, ())]
            if not rows:
                continue
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(f"snn_{name}", metric.text, labels=("run", *metric.labels))
            for *labels, value in rows:
                family.add_metric(labels, value)
            yield family

    def _snapshots(self) -> Iterator[dict]:
        for path, _ in snapshot_files(self._folder):
            try:
                snapshot = json.loads(path.read_bytes())
                _check(snapshot)
            except (OSError, ValueError) as error:
                if path.name not in self._warned:
                    log.warning("%s is not a snapshot of metrics (%s) and is left out", path, error)
                self._warned.add(path.name)
                continue
            yield snapshot


def snapshot_files(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """Every snapshot in the folder; one that disappears meanwhile is left out."""
    found = []
    for path in sorted(folder.glob("*.json")):
        with suppress(FileNotFoundError):
            found.append((path, path.stat()))
    return found


def _check(snapshot: object) -> None:
    """Raises ValueError unless this is what `Snapshot` writes: a file that another program left must do no harm."""
    if not isinstance(snapshot, dict):
        raise ValueError("not an object")
    for name, rows in snapshot.items():
        if name not in METRICS:
            continue  # of another version: `collect` does not ask for it
        width = 2 + len(METRICS[name].labels)
        for row in rows if isinstance(rows, list) else [rows]:
            well_formed = isinstance(row, list) and len(row) == width and all(isinstance(x, str) for x in row[:-1])
            if not well_formed or not isinstance(row[-1], int | float):
                raise ValueError(f"{name} has {row!r}")
