"""A record as a line for people: what rank 0 prints, how numbers and times look in it, and its colours."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import TextIO

COLUMNS = 110
"""Of a line of progress."""
WAIT_SHOWN, WAIT_TELLING = 0.005, 0.05
"""Shares of the time from which a wait for data is shown at all, and shown before all that may be left out."""
_UNITS = ((1e3, "k"), (1e6, "M"), (1e9, "G"))
_WORDS = re.compile(r"\b(step|epoch|loss|acc|cov|width|wait|ETA|img/s)\b|χ")


def progress_line(record: dict, num_steps: int, epoch: float, eta_s: float) -> str:
    """What rank 0 prints every `log_every` steps: at most `COLUMNS` wide, each number in a place of its own.

    What does not fit is left out, the least telling first: a short data wait, then χ, the images' side, widths and
    coverage. All of it is in metrics.jsonl. χ is the least of all layers; coverage and width are least and greatest.

    Args:
        record: of a logged step; numbers that are undefined are NaN.
        epoch: passes over the training split so far.
        eta_s: seconds to the end of the run, as far as one knows.
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
    """Least and greatest of those that are defined; empty where none is."""
    defined = [value for value in values if not math.isnan(value)]
    return f"{_number(min(defined), 4).strip()}–{_number(max(defined), 4).strip()}" if defined else ""


def _number(value: float, places: int) -> str:
    """`value` in so many places, with as many digits as these hold: 0.12, 12.3, 1234, 123k; more where it has to be."""
    if not math.isfinite(value):
        return f"{value:>{places}}"
    for decimals in range(places - 2, -1, -1):
        if len(shown := f"{value:.{decimals}f}") <= places:
            # A number that is not 0 does not look like it.
            return shown.rjust(places) if float(shown) != 0 or value == 0 else f"{value:.0e}"
    return next((s for size, unit in _UNITS if len(s := f"{value / size:.0f}{unit}") <= places), f"{value:.0e}")


def _duration(seconds: float) -> str:
    """`33s`, `12m`, `3h12m`, `5d03h`; in five places."""
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
    """Decimals that show two digits of a rate above 0, or more: 1.7 and 0.017, but 1570."""
    return max(0, 1 - math.floor(math.log10(rate)))


def coloured(line: str, stream: TextIO, environ: Mapping[str, str] = os.environ) -> str:
    """`line` with its words dim and its results bold where `stream` is a terminal and NO_COLOR (no-color.org) is unset
    or empty; else as it is.
    """
    if environ.get("NO_COLOR") or environ.get("TERM") == "dumb" or not stream.isatty():
        return line
    if line.startswith("step ") and "  " in line:
        return _WORDS.sub("\033[2m\\g<0>\033[0m", line)
    return f"\033[1m{line}\033[0m" if line.startswith(("validation after", "done: ")) else line
