"""One record → console, metrics.jsonl and Prometheus. Rank 0 only.

A record's keys are the metrics' names without `snn_`; a value is a number, or for `layer_*` a list in forward order.
"""

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge

LAYER_GAUGES = {
    "layer_chi": "Proportion of the layer's weights with a non-zero gradient",
    "layer_participation_ratio": "Effective proportion of the layer's weights that receive gradient",
    "layer_coverage_ratio": "Fraction of neuron-steps within the surrogate's support",
    "layer_coverage_target_ratio": "Coverage that the controller holds",
    "layer_surrogate_width": "Half-width of the surrogate gradient, in units of the potential",
    "layer_firing_rate_ratio": "Fraction of neuron-steps that spike",
    "layer_gradient_norm": "L2 norm of the gradient of the layer's weights",
}
GAUGES = {
    "train_loss": "Training loss of the last logged step",
    "train_accuracy_ratio": "Training accuracy of the last logged step",
    "train_grad_norm": "L2 norm of the gradients of all spiking layers' weights",
    "train_learning_rate": "Learning rate",
    "train_last_step_timestamp_seconds": "Unix time of the last logged step",
    "train_images_per_second": "Images trained per second since the last logged step, over all ranks",
    "network_chi": "Proportion of all trainable parameters with a non-zero gradient",
    "eval_loss": "Loss of the last evaluation",
    "eval_accuracy_ratio": "Top-1 accuracy of the last evaluation",
    "run_finished": "1 once the run has ended as planned",
    "checkpoint_duration_seconds": "Time that the last checkpoint took",
    "checkpoint_last_success_timestamp_seconds": "Unix time of the last checkpoint",
}
COUNTERS = {
    "train_steps": "Optimizer steps done in this process",
    "train_samples": "Samples trained in this process",
    "train_overflow_steps": "Optimizer steps of this process that an overflow of the fp16 gradient made no update of",
    "checkpoint_saves": "Checkpoints saved in this process",
}
PHASES = "train_phase_seconds"


def layer_labels(names: Sequence[str]) -> list[str]:
    """Labels that sort in forward order: `00-stem.neuron`, `01-…`."""
    digits = max(2, len(str(len(names) - 1)))
    return [f"{index:0{digits}d}-{name}" for index, name in enumerate(names)]


class Exporter:
    """The run's metrics, served for Prometheus until `close()`.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, host: str, port: int, layers: Sequence[str], info: dict[str, str]) -> None:
        self.registry = CollectorRegistry()
        self._layers = layer_labels(layers)
        self._gauges = {name: Gauge(f"snn_{name}", text, registry=self.registry) for name, text in GAUGES.items()}
        self._layer_gauges = {
            name: Gauge(f"snn_{name}", text, ["layer"], registry=self.registry) for name, text in LAYER_GAUGES.items()
        }
        self._counters = {name: Counter(f"snn_{name}", text, registry=self.registry) for name, text in COUNTERS.items()}
        self._phases = Counter(
            f"snn_{PHASES}", "Time of rank 0 spent in each phase of the loop", ["phase"], registry=self.registry
        )
        Gauge("snn_run_info", "What runs", list(info), registry=self.registry).labels(*info.values()).set(1)
        self._server, self._thread = prometheus_client.start_http_server(port, host, registry=self.registry)
        self.address = f"http://{host}:{self._server.server_port}/metrics"

    def publish(self, record: dict) -> None:
        for name, value in record.items():
            if name in self._gauges:
                self._gauges[name].set(value)
            elif name in self._layer_gauges:
                for label, element in zip(self._layers, value, strict=True):
                    self._layer_gauges[name].labels(label).set(element)

    def count(self, **increments: float) -> None:
        for name, increment in increments.items():
            self._counters[name].inc(increment)

    def add_phase(self, phase: str, seconds: float) -> None:
        self._phases.labels(phase).inc(max(0.0, seconds))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Journal:
    """metrics.jsonl: one JSON object a line; opened at a step, it drops the lines of later steps.

    A run that resumes from step k repeats what came after k; the lines of the first attempt go, so that every step
    stands in the file once.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = [line for line in read_journal(path) if line["step"] <= resume_step]
        temporary = path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, path)
        self._file = path.open("a", buffering=1)

    def write(self, record: dict) -> None:
        self._file.write(json.dumps({name: _plain(value) for name, value in record.items()}) + "\n")

    def close(self) -> None:
        self._file.close()


def read_journal(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line cut short by a kill is left out. Empty where there is no file."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _plain(value):
    """JSON has no NaN: an undefined number is null."""
    if isinstance(value, list):
        return [_plain(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def progress_line(record: dict, num_steps: int, eta_s: float) -> str:
    """What rank 0 prints every `log_every` steps."""
    chi, width = record["layer_chi"], record["layer_surrogate_width"]
    coverage = [value for value in record["layer_coverage_ratio"] if not math.isnan(value)]
    parts = [
        f"step {record['step']:>{len(str(num_steps))}}/{num_steps}",
        f"loss {record['train_loss']:.4f}",
        f"acc {100 * record['train_accuracy_ratio']:5.1f} %",
        f"χ {min(chi):.3f}–{max(chi):.3f}",
        f"coverage {min(coverage):.2f}–{max(coverage):.2f}" if coverage else "coverage undefined",
        f"width {min(width):.2f}–{max(width):.2f}",
        f"{record['train_images_per_second']:.0f} img/s",
        f"data wait {100 * record['data_wait_ratio']:.1f} %",
        f"ETA {time.strftime('%H:%M:%S', time.gmtime(eta_s))}",
    ]
    return " · ".join(parts)
