"""The results of a benchmark: rows with goals, the printed table, the JSON file."""

import datetime
import json
import os
import platform
from pathlib import Path


def row(name: str, value: float, unit: str, goal: float | None = None, better: str = "higher") -> dict:
    """One figure. `better`, higher or lower, says on which side of the goal, if any, the value must lie."""
    figure = {"name": name, "value": value, "unit": unit, "goal": goal}
    if goal is None:
        return {**figure, "better": None, "met": None}
    return {**figure, "better": better, "met": value >= goal if better == "higher" else value <= goal}


def show(rows: list[dict]) -> None:
    """Print the table, one line per row."""
    width = max(len(line["name"]) for line in rows)
    for line in rows:
        goal = "" if line["goal"] is None else f"   goal {line['goal']:g}: {'met' if line['met'] else 'missed'}"
        print(f"{line['name']:{width}} {line['value']:12.4g} {line['unit']}{goal}")


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def write(
    path: str | os.PathLike,
    rows: list[dict],
    *,
    hardware: str,
    versions: dict[str, str],
    command: str,
    setting: str,
    **more: object,
) -> None:
    """Write the figures as JSON, with how and on what they were measured, Python's version and the date.

    Args:
        path: the file; its folder is made where there is none.
        rows: from `row`.
        hardware: the processor, how much of it was used, and what hardware was not available.
        versions: of the packages that matter.
        command: the command that measures these figures again.
        setting: what was measured, in a sentence.
        more: anything else to keep, such as every single time.
    """
    report = {
        "hardware": hardware,
        "versions": {"python": platform.python_version()} | versions,
        "date": datetime.date.today().isoformat(),
        "command": command,
        "setting": setting,
        "rows": rows,
        **more,
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
