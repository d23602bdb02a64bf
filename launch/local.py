"""Trains on this machine, as `make train` does:  python -m launch.local --recipe digits [launch/train.py's options]

It is `deepspeed launch/train.py` with what a person at a terminal wants besides: as many ranks as there are GPUs, a
mistake told before anything starts, our lines without the launcher's, and one Ctrl-C that stops with a checkpoint. It
ends with a rank's exit code. Several nodes, restarts and Kubernetes are launch/supervise.py's.
"""

import math
import os
import sys
from pathlib import Path

from launch import options, runner
from launch.devices import TorchError
from launch.place import LOCAL, MASTER_PORT, Place
from launch.ranks import NOT_BEGUN, Ranks, attend, why
from launch.signals import Signals
from launch.train import not_permitted, preflight, say_finished
from pipeline import caches
from pipeline.config import Config
from pipeline.errors import (
    EXIT_DATA,
    EXIT_DONE,
    EXIT_INTERNAL,
    EXIT_STOPPED,
    EXIT_USAGE,
    ConfigError,
    DataError,
)

SAID = (EXIT_USAGE, EXIT_DATA, EXIT_INTERNAL, EXIT_STOPPED)
"""Exit codes of ranks that have told why."""


def main(arguments: list[str]) -> int:
    signals = Signals()
    os.environ.update(homeless := caches.stand_ins(os.environ))
    if told := caches.line(homeless):
        say(told)
    try:
        config, dry_run = options.command(arguments)
        place = runner.with_ranks(Place(nodes=1, rank=0, master=LOCAL, port=MASTER_PORT, slots=0), config, os.environ)
        if dry_run is not None:
            from launch.dry_run import show

            return show(config, dry_run or place.slots)
        if finished := preflight(config, place.slots):
            say_finished(config, finished)
            return EXIT_DONE
        signals.wait(0)
        if signals.seen:
            return stopped_early()
        ranks = Ranks(runner.command(place, Path(), arguments), runner.environment(place, os.environ), apart=False)
        return verdict(config, attend(ranks, signals, math.inf, say), signals)
    except (ConfigError, DataError, TorchError) as error:
        say(f"error: {error}")
        return error.exit_code
    except PermissionError as error:
        say(f"error: {not_permitted(error)}")
        return EXIT_USAGE
    finally:
        signals.close()


def verdict(config: Config, ended: int, signals: Signals) -> int:
    """This command's exit code, after a line where the ranks have said none.

    Args:
        ended: the launcher's exit code, which is 0 too where a part of it was killed.
    """
    if (Path(config.run_dir) / "summary.json").exists():
        return EXIT_DONE
    if signals.urgent:
        return 128 + signals.seen[-1]
    if ended in SAID:
        return ended
    if signals.seen and ended == NOT_BEGUN:
        return stopped_early()
    say(f"error: the run ended early: {why(ended)}; run again to go on from the newest checkpoint")
    return EXIT_INTERNAL


def stopped_early() -> int:
    say("stopped on request before the first step; run again to continue")
    return EXIT_STOPPED


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
