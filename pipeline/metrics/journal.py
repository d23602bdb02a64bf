"""Records as lines of metrics.jsonl and of the console. Rank 0 only; rank_metrics.py shows them to Prometheus.

A record's keys are the metrics' names without `snn_`; a value is a number, or for `layer_*` a list in forward order.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

COLUMNS = 110
"""Largest width of a line of progress, in characters."""
WAIT_SHOWN, WAIT_TELLING = 0.005, 0.05
"""Shares of the time: a shorter wait for data than the first is not shown, one from the second on is never left out."""
_UNITS = ((1e3, "k"), (1e6, "M"), (1e9, "G"))
_WORDS = re.compile(r"\b(step|epoch|loss|acc|cov|width|wait|ETA|img/s)\b|χ")


def layer_labels(names: Sequence[str]) -> list[str]:
    """Labels that sort in forward order: `00-stem.neuron`, `01-…`."""
    digits = max(2, len(str(len(names) - 1)))
    return [f"{index:0{digits}d}-{name}" for index, name in enumerate(names)]


class Journal:
    """metrics.jsonl: one JSON object per line. When it is opened at a step, the lines of later steps are removed.

    A run that resumes from step k repeats the steps after k. The lines of the first attempt are removed, so that every
    step is in the file once. At step 0 the run begins, and its journal is empty.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        kept = [line for line in read_journal(path) if line["step"] <= resume_step and resume_step > 0]
        temporary = path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, path)
        self._file = path.open("a", buffering=1)

    def write(self, record: dict) -> None:
        self._file.write(json.dumps({name: _plain(value) for name, value in record.items()}) + "\n")

    def close(self) -> None:
        self._file.close()


def read_journal(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line cut short by a kill is left out. Empty if there is no file."""
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


def progress_line(record: dict, num_steps: int, epoch: float, eta_s: float) -> str:
    """What rank 0 prints every `log_every` steps: at most `COLUMNS` wide, each number in a fixed place.

    What does not fit is left out, the least useful first: a short data wait, then χ, the images' side, widths and
    coverage. All of it is in metrics.jsonl. χ is the minimum over layers; coverage and width are minimum and maximum.

    Args:
        record: of a logged step; numbers that are undefined are NaN.
        epoch: passes over the training split so far.
        eta_s: estimated seconds to the end of the run.
    """
    side, wait = record.get("train_image_size_pixels"), record["data_wait_ratio"]
    coverage = _range(record["layer_coverage_ratio"])
    parts = {
        "step": f"step {record['step']:>{len(str(num_steps))}}/{num_steps}",
        "epoch": f"epoch {epoch:>3.{int(epoch < 9.95)}f}",
        "loss": f"loss {_number(record['train_loss'], 6)}",
        "acc": f"acc {_number(100 * record['train_accuracy_ratio'], 4)}%",
        "χ": f"χ {_least(record['layer_chi']):.3f}",
        "coverage": f"cov {coverage}" if coverage else "",
        "width": f"width {_range(record['layer_surrogate_width'])}",
        "side": f"{side}²" if side is not None else "",
        "rate": f"{_number(record['train_images_per_second'], 4)} img/s",
        "wait": f"wait {100 * wait:.0f}%" if wait >= WAIT_SHOWN else "",
        "ETA": f"ETA {_duration(eta_s)}",
    }
    short = ["wait"] if wait < WAIT_TELLING else []
    for name in ["", *short, "χ", "side", "width", "coverage"]:
        parts.pop(name, None)
        line = "  ".join(part for part in parts.values() if part)
        if len(line) <= COLUMNS:
            return line
    return line[:COLUMNS]


def _least(values: Sequence[float]) -> float:
    return min((value for value in values if not math.isnan(value)), default=math.nan)


def _range(values: Sequence[float]) -> str:
    """Minimum and maximum of the values that are defined; empty if none is."""
    defined = [value for value in values if not math.isnan(value)]
    return f"{_number(min(defined), 4).strip()}–{_number(max(defined), 4).strip()}" if defined else ""


def _number(value: float, places: int) -> str:
    """`value` in `places` characters, with as many digits as fit: 0.12, 12.3, 1234, 123k; in more if it must be."""
    if not math.isfinite(value):
        return f"{value:>{places}}"
    for decimals in range(places - 2, -1, -1):
        if len(shown := f"{value:.{decimals}f}") <= places:
            # A number that is not 0 is not shown as 0.
            return shown.rjust(places) if float(shown) != 0 or value == 0 else f"{value:.0e}"
    return next((s for size, unit in _UNITS if len(s := f"{value / size:.0f}{unit}") <= places), f"{value:.0e}")


def _duration(seconds: float) -> str:
    """`33s`, `12m`, `3h12m`, `5d03h`; at most five characters."""
    if not seconds < 1000 * 86400:
        return "?" if math.isnan(seconds) else ">999d"
    minutes, s = divmod(int(max(0.0, seconds)), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02}h" if days < 100 else f"{days}d"
    if h:
        return f"{h}h{m:02}m"
    return f"{m}m" if m else f"{s}s"


def rate_decimals(rate: float) -> int:
    """Decimals that show at least two digits of a rate above 0: 1.7, 0.017, 1570."""
    return max(0, 1 - math.floor(math.log10(rate)))


def coloured(line: str, stream: TextIO, environ: Mapping[str, str] = os.environ) -> str:
    """`line` with dim words and bold results if `stream` is a terminal and NO_COLOR (no-color.org) is unset or empty;
    else unchanged.
    """
    if environ.get("NO_COLOR") or environ.get("TERM") == "dumb" or not stream.isatty():
        return line
    if line.startswith("step ") and "  " in line:
        return _WORDS.sub("\033[2m\\g<0>\033[0m", line)
    return f"\033[1m{line}\033[0m" if line.startswith(("validation after", "done: ")) else line
