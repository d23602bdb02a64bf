"""What a node serves on one port: its ranks' metrics, /healthz and /readyz.

The ranks write snapshots into a folder instead of opening ports of their own (pipeline/metrics/exporter.py). /readyz:
the ranks run and have logged a step. /healthz: the supervisor's loop runs, and running ranks have logged a step within
STALLED_S + train.timeout_s. Time in which the node waits for other nodes does not count.
"""

import json
import time
from contextlib import suppress
from pathlib import Path

from launch.cluster.signals import Signals
from pipeline.config import Config
from pipeline.metrics.exporter import FOLDER_VARIABLE, USUAL_PORT, NodeServer, tls_of
from pipeline.metrics.snapshots import Snapshot, snapshot_files

ROUND_S = 120.0
"""Longest round of the supervisor's loop. Usually it takes half a second, more where a name server does not answer."""
STALLED_S = 3600.0
"""Longest silence of ranks. It has good reasons too: a first step that compiles, an evaluation, a checkpoint of many
gigabytes."""


class NodeMetrics:
    """The node's port, open until `close()`. Where `port` is None: the usual one, or a free one if that is taken.

    Raises:
        ConfigError: the port is taken.
    """

    def __init__(self, config: Config, node: int, folder: Path, host: str, port: int | None, signals: Signals) -> None:
        self._folder, self._stalled_s, self._signals = folder, STALLED_S + config.train.timeout_s, signals
        self._started: float | None = None
        self._own = Snapshot(folder, "supervisor", run=Path(config.run_dir).name, node=str(node))
        self._own.add("run_restarts", 0)
        self._own.write()
        self._server = NodeServer(
            folder,
            host=host,
            port=USUAL_PORT if port is None else port,
            or_any=port is None,
            ready=self._ready,
            healthy=self._healthy,
            tls=tls_of(config.metrics),
        )
        self.said = self._server.said
        self.variables = {FOLDER_VARIABLE: str(folder)}
        """For the ranks' environment."""

    def ranks_run(self, running: bool) -> None:
        self._started = time.time() if running else None

    def restarted(self) -> None:
        self._own.add("run_restarts")
        self._own.write()

    def close(self, *, seen: bool) -> None:
        """Stops serving. With `seen`, first waits until a Prometheus that scrapes regularly has read the end.

        After a request to stop it waits only if a step was logged, not for long, and until the request is repeated.
        """
        stopped = bool(self._signals.seen)
        if seen and (not stopped or self._last_step()):
            self._server.linger(stopped=stopped, urgent=self._asked_again)
        self._server.close()

    def _asked_again(self) -> bool:
        self._signals.wait(0)
        return self._signals.urgent

    def _last_step(self) -> float:
        """Unix time of the newest step that a rank of this node has logged; 0 where there is none."""
        times = [0.0]
        for path, _ in snapshot_files(self._folder):
            with suppress(OSError, ValueError, AttributeError, TypeError, IndexError):
                rows = json.loads(path.read_bytes()).get("train_last_step_timestamp_seconds", ())
                times += [float(row[-1]) for row in rows]
        return max(times)

    def _ready(self) -> bool:
        started = self._started
        return started is not None and self._last_step() >= started

    def _healthy(self) -> bool:
        started = self._started
        if started is not None and time.time() - max(started, self._last_step()) > self._stalled_s:
            return False
        return time.monotonic() - self._signals.looked_at < ROUND_S
