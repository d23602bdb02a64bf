"""What the commands share: their parser, the launcher's variables, and one line and an exit code for each error."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.errors import EXIT_DONE, EXIT_INTERNAL, ConfigError, DataError, is_outage
from pipeline.run_dir import caches, outages

RANKS = {
    "WORLD_SIZE": (1, 2**20),
    "RANK": (0, 2**20),
    "LOCAL_RANK": (0, 2**20),
    "LOCAL_SIZE": (1, 2**20),
    "LOCAL_WORLD_SIZE": (1, 2**20),
    "MASTER_PORT": (1, 65535),
}
"""The variables that launchers set for a rank: the smallest and the largest value of each."""


class Parser(argparse.ArgumentParser):
    """Raises `ConfigError` where argparse would print the whole usage and exit with code 2."""

    def error(self, message: str):
        raise ConfigError(f"{message}; see --help")


def rank_variables(environ: Mapping[str, str]) -> tuple[int, int]:
    """This process's rank and the number of ranks, from the launcher's variables; (0, 1) without a launcher.

    Raises:
        ConfigError: a variable of RANKS is no number or out of its range, or RANK is not below WORLD_SIZE.
    """
    for name, (least, most) in RANKS.items():
        got = environ.get(name, str(least))
        if not (got.isascii() and got.isdecimal() and len(got) < 20 and least <= int(got) <= most):
            raise ConfigError(
                f"{name}={got!r} in the environment is not allowed; a launcher sets a number from {least} to {most}: "
                "start the ranks by deepspeed, or unset it"
            )
    rank, world_size = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
    if rank >= world_size:
        raise ConfigError(
            f"RANK={rank} in the environment is not allowed with WORLD_SIZE={world_size}; ranks count from 0: start "
            "them by deepspeed, or unset both"
        )
    return rank, world_size


def run_parser(name: str, description: str) -> Parser:
    """The command `python -m launch.NAME RUN [--checkpoint STEP] [--weights last|ema]`."""
    parser = Parser(prog=f"python -m launch.{name}", description=description, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, finished or not: runs/digits")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="the checkpoint after this step [the newest]")
    parser.add_argument(
        "--weights", choices=("last", "ema"), help="of that step, or their moving average [what the run evaluates]"
    )
    return parser


def run(command: Callable[[list[str]], None]) -> int:
    """Runs `command` with the words of the command line; returns the exit code."""
    os.environ.update(caches.stand_ins(os.environ))
    try:
        command(sys.argv[1:])
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if not is_outage(error):
            raise
        print(f"error: {outages.gone(error, error.filename or 'a file', 0)}", file=sys.stderr)
        return EXIT_INTERNAL
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return EXIT_DONE
