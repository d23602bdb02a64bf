"""What the commands share: one line for a mistake, and its exit code."""

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline import caches
from pipeline.errors import EXIT_DONE, ConfigError, DataError


class Parser(argparse.ArgumentParser):
    """Raises what argparse would print with all options above it and exit code 2."""

    def error(self, message: str):
        raise ConfigError(f"{message}; see --help")

    def refuse_unknown(self, unknown: list[str]) -> None:
        """Names the option that was not known, and the one that it is like."""
        option = unknown[0].partition("=")[0]
        known = [name for name in self._option_string_actions if name.startswith("--")]
        close = difflib.get_close_matches(option, known, n=1)
        self.error(f"{option} is not an option" + (f"; did you mean {close[0]}?" if close else ""))


def run_parser(name: str, description: str) -> Parser:
    """The command `python -m launch.NAME RUN [--checkpoint STEP] [--weights last|ema]`."""
    parser = Parser(prog=f"python -m launch.{name}", description=description, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, finished or not: runs/digits")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="the checkpoint after this step [the newest]")
    parser.add_argument(
        "--weights", choices=("last", "ema"), help="those of the step, or their moving average [what the run evaluates]"
    )
    return parser


def run(command: Callable[[list[str]], None]) -> int:
    """The exit code of `command`, which was given the command line."""
    os.environ.update(caches.stand_ins(os.environ))
    try:
        command(sys.argv[1:])
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return EXIT_DONE
