"""RUN/logs/rank-N.log has every rank's lines, with the time; the console shows rank 0's, and every rank's errors.

Standard library only. A console that goes away (a closed terminal, a pipe whose reader died) does not end
the run: its lines are in the file. Neither does a file system that goes away: its lines are written when it is back.
"""

import logging
import os
import re
import sys
import time
from pathlib import Path
from typing import TextIO

from pipeline.run_dir.outages import Lines

COLOUR = re.compile("\033\\[[0-9;]*m")


class Tee:
    """A text stream that writes to a log file, and to the console if `shown`."""

    def __init__(self, console: TextIO, file: Lines, *, shown: bool) -> None:
        self._console, self._file, self._shown = console, file, shown
        self._at_line_start = True

    def write(self, text: str) -> int:
        if self._shown:
            try:
                self._console.write(text)
            except OSError:
                self._shown = False
        for line in COLOUR.sub("", text).splitlines(keepends=True):
            if self._at_line_start:
                self._file.write(time.strftime("%Y-%m-%d %H:%M:%S "))
            self._file.write(line)
            self._at_line_start = line.endswith("\n")
        return len(text)

    def flush(self) -> None:
        if self._shown:
            try:
                self._console.flush()
            except OSError:
                self._shown = False

    def __getattr__(self, name: str):
        return getattr(self._console, name)


def begin(run_dir: Path, rank: int) -> None:
    """From here on, this process's output also goes to its rank's log; a resumed run appends to it."""
    folder = run_dir / "logs"
    file = Lines(folder / f"rank-{rank}.log", begin=lambda: folder.mkdir(exist_ok=True), lossy=True)
    file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} --- process {os.getpid()}: {' '.join(sys.argv[1:])}\n")
    sys.stdout = Tee(sys.stdout, file, shown=rank == 0)
    sys.stderr = Tee(sys.stderr, file, shown=True)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
