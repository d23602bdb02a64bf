"""What the `deepspeed` launcher runs on each rank:  deepspeed launch/train.py --recipe digits

All that a user may have set wrongly is checked here, before torch is imported: a mistake costs a second and one line,
not a traceback from each rank.
"""

import errno
import logging
import os
import signal
import sys
import traceback
import typing
from collections.abc import MutableMapping
from pathlib import Path

from launch import ports
from launch.cluster.placement import LOCAL, MASTER_PORT
from launch.command import rank_variables
from launch.options import command
from pipeline.config import Config
from pipeline.data.manifest import check_splits
from pipeline.engine.deepspeed_settings import deepspeed_settings
from pipeline.errors import (
    EXIT_DONE,
    EXIT_INTERNAL,
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    LostRankError,
    NonFiniteError,
    is_outage,
)
from pipeline.metrics import trackers
from pipeline.ranks.stop_requests import Watch
from pipeline.run_dir import caches, locks, outages, rank_log, run_folder
from pipeline.snn.networks import own_source

PATIENCE_S = 10
QUIET = ("pipeline.engine", "pipeline.snn", "pipeline.run_dir.checkpoint_files")
"""Loggers whose warnings only rank 0 prints; their errors every rank prints."""
LAUNCHED = frozenset(("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"))
"""Every launcher that starts ranks sets at least one of these."""
Expected = CheckpointError | ConfigError | DataError | DivergedError | LostRankError | NonFiniteError
EXPECTED = typing.get_args(Expected)


def main(arguments: list[str]) -> int:
    os.environ.update(homeless := caches.stand_ins(os.environ))
    try:
        rank, world_size = rank_variables(os.environ)
    except ConfigError as error:
        return refuse(error, 0)
    alone_without_launcher(os.environ)
    # DeepSpeed logs on every rank which device it found. The first line of our own says it once.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    logging.basicConfig(format=f"%(levelname)s rank {rank}: %(message)s")
    logging.getLogger("pipeline").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    if rank != 0:  # these warn of the machine (no compiler, no bf16) or the run (a damaged checkpoint): once is enough
        for name in QUIET:
            logging.getLogger(name).setLevel(logging.ERROR)
    if rank != 0 and os.environ.get("LOCAL_RANK") != "0":  # all ranks of a node meet the same outage
        logging.getLogger(outages.__name__).setLevel(logging.ERROR)
    if rank == 0 and (told := caches.line(homeless)):
        logging.getLogger("pipeline.run_dir.caches").info(told)
    try:
        config, dry_run = command(arguments)
        if dry_run is not None:
            from launch.dry_run import show

            return show(config, dry_run) if rank == 0 else EXIT_DONE
        finished = preflight(config, world_size)
        if finished is not None:
            if rank == 0:
                say_finished(config, finished)
            return EXIT_DONE
        watch = Watch()
        if rank == 0:
            lock = locks.hold(config.run_dir)  # noqa: F841 held until this process ends
        ports.prepare(rank, config, arguments)
        rank_log.begin(Path(config.run_dir), rank)
        from pipeline.train import train  # torch is imported here, after everything cheap was checked

        return train(config, watch)
    except EXPECTED as error:
        return refuse(error, rank)
    except Exception as error:
        if isinstance(error, OSError) and is_outage(error, was_writable=True):
            return refuse(outages.gone(error, error.filename or "a file", 0), rank)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f"{error.filename} " if error.filename else ""
            return refuse(CheckpointError(f"{where}cannot be written ({error.strerror}); mend it and run again"), rank)
        if isinstance(error, PermissionError) and error.filename:
            return refuse(not_permitted(error), rank)
        traceback.print_exc()
        return EXIT_INTERNAL


def not_permitted(error: PermissionError) -> ConfigError:
    return ConfigError(f"{error.filename} cannot be used by this user ({error.strerror}); change its permissions")


def alone_without_launcher(environ: MutableMapping[str, str]) -> None:
    """Makes a process that no launcher has started the only rank."""
    if not LAUNCHED & environ.keys():
        only = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": LOCAL}
        environ.update(only, MASTER_PORT=str(MASTER_PORT))


def preflight(config: Config, world_size: int) -> dict | None:
    """Checks configuration, data and run folder for `world_size` ranks; the summary of a finished run, else None."""
    deepspeed_settings(config, world_size, num_parameters=0)
    source = own_source.find(config.model.arch)
    train = check_splits(config.data)
    config.num_steps(train.num_samples)
    trackers.require(config)
    finished = run_folder.admit(config, world_size)
    run_folder.refuse_other_data(config, train.identity)
    if source is not None:
        run_folder.refuse_other_network(config, source.digest, source.folder)
    if (
        config.init_from
        and not (Path(config.run_dir) / "checkpoints").exists()
        and not os.path.exists(config.init_from)
    ):
        raise ConfigError(f"init_from={config.init_from!r} does not exist; name a run's folder or a file of weights")
    return finished


def say_finished(config: Config, summary: dict) -> None:
    accuracy = 100 * summary["eval_accuracy_ratio"]
    print(f"{config.run_dir} has finished: {accuracy:.2f} % on the validation split; nothing to do")
    print(f"(see {config.run_dir}/report.html; remove the folder or choose another --run_dir to train again)")


def refuse(error: Expected, rank: int) -> int:
    """Prints the error; returns its exit code.

    The launcher ends all ranks when the first one exits, so the other ranks of node 0 let rank 0 print first.
    """
    if rank != 0 and rank == int(os.environ.get("LOCAL_RANK", rank)):
        # The launcher's SIGTERM ends this process once rank 0 has exited; without it the error is this rank's alone.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.sigtimedwait([signal.SIGUSR2], PATIENCE_S)
    print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
    return error.exit_code


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is a step to save, Ctrl-C just ends the rank
    raise SystemExit(main(sys.argv[1:]))
