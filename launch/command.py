"""What the commands that look at a finished run share: one line for a mistake, and its exit code."""

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import EXIT_DONE, ConfigError, DataError


class Parser(argparse.ArgumentParser):
    """Raises what argparse would print with all options above it and exit code 2."""

    def error(self, message: str):
        raise ConfigError(f"{message}; see --help")


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
    try:
        command(sys.argv[1:])
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return EXIT_DONE
