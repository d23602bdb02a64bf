"""One record → metrics.jsonl. Rank 0 only; console.py shows it to people, rank_metrics.py to Prometheus.

A record's keys are the metrics' names without `snn_`; a value is a number, or for `layer_*` a list in forward order.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from pipeline.run_dir import atomic, outages


def layer_labels(names: Sequence[str]) -> list[str]:
    """Labels that sort in forward order: `00-stem.neuron`, `01-…`."""
    digits = max(2, len(str(len(names) - 1)))
    return [f"{index:0{digits}d}-{name}" for index, name in enumerate(names)]


class Journal:
    """metrics.jsonl: one JSON object per line. When it is opened at a step, the lines of later steps are removed.

    A run that resumes from step k repeats the steps after k. The lines of the first attempt are removed, so that every
    step is in the file once. At step 0 the run begins, and its journal is empty. While the file's storage is gone,
    lines wait in memory: training goes on, and they are written with the first line after it is back.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self._path = path
        self._lines = outages.Lines(path, begin=lambda: self._cut(resume_step))

    def _cut(self, resume_step: int) -> None:
        kept = [line for line in read_journal(self._path) if line["step"] <= resume_step and resume_step > 0]
        atomic.write(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, record: dict) -> None:
        """Raises StoreError where the storage has been gone for too long, OSError where the line cannot be written."""
        self._lines.write(json.dumps({name: _plain(value) for name, value in record.items()}) + "\n")

    def close(self) -> None:
        """Waits for storage that is gone, so that no line is lost; raises as `write`."""
        self._lines.close()


def read_journal(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line cut short by a kill is left out. Empty if there is no file."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    records = []
    for line in text.splitlines():
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
