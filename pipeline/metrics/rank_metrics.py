"""What a rank shows to Prometheus; rank 0 also shows the run. A supervisor serves it, else the node's first rank."""

import atexit
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from platform import python_version

import torch

from pipeline import __version__
from pipeline.config import Config
from pipeline.data.loader import Figures
from pipeline.data.samples import REASONS
from pipeline.metrics.catalogue import METRICS
from pipeline.metrics.exporter import FOLDER_VARIABLE, USUAL_PORT, NodeServer, tls_of
from pipeline.metrics.journal import layer_labels
from pipeline.metrics.snapshots import Snapshot

PHASES = ("data_wait", "compute", "checkpoint", "evaluation")
RESULTS = ("success", "error")
STARTING_AT_ZERO = ("train_steps", "train_samples", "train_overflow_steps", "train_nonfinite_steps")
"""Set to 0 at the start, so that Prometheus sees the first increase: it ignores the first value of a series."""


class RankMetrics:
    """One rank's values; Prometheus sees them after `write`. Every rank makes its own at the same time (a collective).

    Raises:
        ConfigError: this rank is the one that serves, and the port is taken or a TLS file cannot be used.
    """

    def __init__(
        self,
        config: Config,
        *,
        rank: int,
        local_rank: int,
        world_size: int,
        layers: Sequence[str],
        num_steps: int,
        identity: str,
    ) -> None:
        self._server, self._finished, self._stopped, self._failed = None, False, False, False
        folder = os.environ.get(FOLDER_VARIABLE)
        if not folder:
            self._server = _serve(config) if local_rank == 0 else None
            folders: list = [None] * world_size
            torch.distributed.all_gather_object(folders, str(self._server.folder) if self._server else None)
            folder = folders[rank - local_rank]
        self.said = self._server.said if self._server else None
        """The server's line for the console; None if another process serves."""
        self._layers = layer_labels(layers)
        self._snapshot = Snapshot(Path(folder), f"rank-{rank}", run=Path(config.run_dir).name, rank=str(rank))
        for phase in PHASES:
            self.add_phase(phase, 0.0)
        self._shown = Figures(wait_s=0.0, queue_depth=0, bytes_read=0, bad=dict.fromkeys(REASONS, 0), image_size=0)
        self._count_data(self._shown)
        if rank == 0:
            self._describe(config, world_size, num_steps, identity)
        self.write()

    def _describe(self, config: Config, world_size: int, num_steps: int, identity: str) -> None:
        versions = {"torch": version("torch"), "deepspeed": version("deepspeed")}
        self._snapshot.set("build_info", 1, version=__version__, python=python_version(), **versions)
        self._snapshot.set("run_info", 1, recipe=config.recipe, data=identity[:12], world_size=str(world_size))
        self.publish({"run_finished": 0, "run_stopped": 0, "train_steps_planned": num_steps})
        self.count(**dict.fromkeys(STARTING_AT_ZERO, 0))
        for result in RESULTS:
            self.count_save(result, 0)

    def publish(self, record: dict) -> None:
        """Sets the gauges that a record of the journal has; a value is a number, or for `layer_*` a list."""
        for name, value in record.items():
            if name.startswith("layer_") and name in METRICS:
                for label, element in zip(self._layers, value, strict=True):
                    if not math.isnan(element):  # undefined for this surrogate or in this step
                        self._snapshot.set(name, element, layer=label)
            elif name in METRICS:
                self._snapshot.set(name, value)

    def count(self, **increments: float) -> None:
        for name, increment in increments.items():
            self._snapshot.add(name, increment)

    def count_save(self, result: str, increment: float = 1.0) -> None:
        """`result` of a checkpoint: success or error."""
        self._snapshot.add("checkpoint_saves", increment, result=result)

    def add_phase(self, phase: str, seconds: float) -> None:
        self._snapshot.add("train_phase_seconds", seconds, phase=phase)

    def pace(self, steps: int, elapsed_s: float, aside_s: float, data: Figures) -> None:
        """Records what `steps` steps took on this rank; `aside_s` seconds of it were checkpoints and evaluations."""
        working_s = max(0.0, elapsed_s - aside_s)
        waited_s = data.wait_s - self._shown.wait_s
        self.add_phase("data_wait", waited_s)
        self.add_phase("compute", working_s - waited_s)
        self.publish({"train_step_duration_seconds": working_s / steps, "data_queue_depth": data.queue_depth})
        self._count_data(data)

    def _count_data(self, data: Figures) -> None:
        self._snapshot.add("data_bytes_read", data.bytes_read - self._shown.bytes_read)
        for reason, count in data.bad.items():
            self._snapshot.add("data_samples_bad", count - self._shown.bad.get(reason, 0), reason=reason)
        self._shown = data

    def finish(self) -> None:
        """Shows that the run has ended as planned."""
        self._finished = True
        self.publish({"run_finished": 1})
        self.write()

    def stop(self) -> None:
        """Shows that the run has stopped on request, and can go on from its checkpoint."""
        self._stopped = True
        self.publish({"run_stopped": 1})
        self.write()

    def fail(self) -> None:
        """Shows what ends the run, which has been counted; `close` then keeps the server until it can be read."""
        self._failed = True
        self.write()

    def write(self) -> None:
        self._snapshot.write()

    def close(self) -> None:
        """Closes the server: after a run that finished or stopped, once Prometheus has read the end; after a failed
        one, when the process ends, which can report the error before.
        """
        if self._server is None:
            return
        if self._failed:
            atexit.register(_leave, self._server)
            return
        if self._finished or self._stopped:
            self._server.linger(stopped=self._stopped)
        _close(self._server)


def _leave(server: NodeServer) -> None:
    server.linger()
    _close(server)


def _close(server: NodeServer) -> None:
    server.close()
    shutil.rmtree(server.folder, ignore_errors=True)


def _serve(config: Config) -> NodeServer:
    """This node's server, over a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="chispike-metrics-"))
    try:
        metrics = config.metrics
        or_any = metrics.port == USUAL_PORT  # a port that the user named was checked before: if taken, refused
        return NodeServer(folder, host=metrics.host, port=metrics.port, or_any=or_any, tls=tls_of(metrics))
    except BaseException:
        folder.rmdir()
        raise
