"""Trains on this machine, as `make train` does:  python -m launch.local --recipe digits [launch/train.py's options]

It runs `deepspeed launch/train.py` for a user at a terminal: one rank for each GPU, errors before anything starts, no
lines of the launcher, and one Ctrl-C saves a checkpoint and stops. The exit code is that of a rank. For several nodes,
restarts and Kubernetes there is launch/supervise.py.
"""

import math
import os
import sys
from pathlib import Path

from launch import options
from launch.cluster import launcher
from launch.cluster.placement import LOCAL, MASTER_PORT, Placement
from launch.cluster.processes import NOT_BEGUN, Processes, attend, why
from launch.cluster.signals import Signals
from launch.devices import TorchError
from launch.train import not_permitted, preflight, say_finished
from pipeline.config import Config
from pipeline.errors import (
    EXIT_DATA,
    EXIT_DONE,
    EXIT_INTERNAL,
    EXIT_STOPPED,
    EXIT_USAGE,
    ConfigError,
    DataError,
    is_outage,
)
from pipeline.run_dir import caches, outages

SAID = (EXIT_USAGE, EXIT_DATA, EXIT_INTERNAL, EXIT_STOPPED)
"""Exit codes of ranks that have printed the reason themselves."""


def main(arguments: list[str]) -> int:
    signals = Signals()
    os.environ.update(homeless := caches.stand_ins(os.environ))
    if told := caches.line(homeless):
        say(told)
    try:
        config, dry_run = options.command(arguments)
        place = launcher.with_ranks(
            Placement(nodes=1, rank=0, master=LOCAL, port=MASTER_PORT, slots=0), config, os.environ
        )
        if dry_run is not None:
            from launch.dry_run import show

            return show(config, dry_run or place.slots)
        with outages.paused_by(signals.pause):
            finished = preflight(config, place.slots)
        if finished:
            say_finished(config, finished)
            return EXIT_DONE
        signals.wait(0)
        if signals.seen:
            return stopped_early()
        ranks = Processes(
            launcher.command(place, Path(), arguments), launcher.environment(place, os.environ), apart=False
        )
        return verdict(config, attend(ranks, signals, math.inf, say), signals)
    except (ConfigError, DataError, TorchError) as error:
        say(f"error: {error}")
        return error.exit_code
    except PermissionError as error:
        say(f"error: {not_permitted(error)}")
        return EXIT_USAGE
    except InterruptedError:
        return stopped_early()
    except OSError as error:
        if not is_outage(error, was_writable=True):
            raise
        say(f"error: {outages.gone(error, error.filename or 'a file', 0)}")
        return EXIT_INTERNAL
    finally:
        signals.close()


def verdict(config: Config, ended: int, signals: Signals) -> int:
    """This command's exit code. Prints the reason where the ranks have not.

    Args:
        ended: the launcher's exit code. It is 0 even where one of the launcher's own processes was killed.
    """
    if (Path(config.run_dir) / "summary.json").exists():
        return EXIT_DONE
    if signals.urgent:
        return 128 + signals.seen[-1]
    if ended in SAID:
        return ended
    if signals.seen and ended < 0:  # our whole group was signalled, and the launcher took the ranks' codes with it
        say("stopped on request; run again to go on from the newest checkpoint")
        return 128 + signals.seen[0]
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
