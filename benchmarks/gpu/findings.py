"""What a step finds: checks and figures, written line by line, so that a crash loses nothing found before it."""

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks import table


class Findings:
    """The findings of one step, as JSON lines in a file.

    Args:
        path: the file; every line is written at once.
        simulated: the step runs on the CPU with toy sizes. Then a figure is named, and its value is left out.
        options: what the command was given for the steps, such as the peer's Python.
    """

    def __init__(self, path: str | Path, *, simulated: bool, options: dict) -> None:
        self.path, self.simulated, self.options = Path(path), simulated, options

    def _add(self, finding: dict) -> None:
        if self.simulated:
            finding["simulated"] = True
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finding) + "\n")

    def facts(self, **facts: object) -> None:
        """What the machine is: goes to the report's head."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"facts": facts}) + "\n")

    def check(self, name: str, passed: bool, said: str = "") -> None:
        """Something that must be so; a step with a check that did not pass has failed."""
        self._add({"name": name, "passed": bool(passed), "said": said})

    def attempt(self, name: str, call: Callable[[], str | None]) -> None:
        """A check that passes unless `call` raises; what it returns or raises is said."""
        try:
            said = call() or ""
        except Exception as error:  # the next check goes on
            self.check(name, False, reason(error))
        else:
            self.check(name, True, said)

    def figure(
        self, name: str, value: float | None, unit: str, goal: float | None = None, better: str = "higher"
    ) -> None:
        """Something measured; a missed goal is shown and fails nothing. None: it cannot be measured here."""
        if self.simulated:
            self._add({"name": name, "unit": unit})
        elif value is None:
            self.absent(name, "it cannot be measured here")
        else:
            self._add(table.row(name, value, unit, goal, better))

    def absent(self, name: str, why: str) -> None:
        """A figure or check that this machine or version cannot give."""
        self._add({"name": name, "absent": why})


def reason(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]
