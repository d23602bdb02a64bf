"""What the `deepspeed` launcher runs on each rank:  deepspeed launch/train.py --recipe digits

Everything that a user can have asked wrongly is checked here, before torch is imported: a mistake costs a second and
one line, not a traceback from each rank.
"""

import errno
import logging
import os
import signal
import socket
import sys
import traceback
import typing
from pathlib import Path

from launch.options import command
from pipeline import exporter, rank_log, run_folder, run_lock, trackers
from pipeline.config import Config
from pipeline.data.splits import check_splits
from pipeline.deepspeed_settings import deepspeed_settings
from pipeline.errors import (
    EXIT_DONE,
    EXIT_INTERNAL,
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    LostRankError,
    NonFiniteError,
)
from pipeline.snn.archs import ARCHS
from pipeline.stops import Watch

PATIENCE_S = 10
Expected = CheckpointError | ConfigError | DataError | DivergedError | LostRankError | NonFiniteError
EXPECTED = typing.get_args(Expected)


def main(arguments: list[str]) -> int:
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(format=f"%(levelname)s rank {rank}: %(message)s")
    logging.getLogger("pipeline").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    if rank != 0:  # what these say is of the machine (no compiler, no bf16) or the run (a damaged checkpoint), once
        for name in ("pipeline.engine", "pipeline.snn", "pipeline.checkpoint_files"):
            logging.getLogger(name).setLevel(logging.ERROR)
    try:
        config, dry_run = command(arguments)
        if dry_run is not None:
            from launch.dry_run import show

            return show(config, dry_run) if rank == 0 else EXIT_DONE
        finished = preflight(config)
        if finished is not None:
            if rank == 0:
                accuracy = 100 * finished["eval_accuracy_ratio"]
                print(f"{config.run_dir} has finished: {accuracy:.2f} % on the validation split; nothing to do")
                print(
                    f"(see {config.run_dir}/report.html; remove the folder or choose another --run_dir to train again)"
                )
            return EXIT_DONE
        watch = Watch()
        if rank == 0:
            lock = run_lock.hold(config.run_dir)  # noqa: F841 until this process ends
            check_ports(config)
        rank_log.begin(Path(config.run_dir), rank)
        from pipeline.train import train  # torch is imported here, after everything cheap was checked

        return train(config, watch)
    except EXPECTED as error:
        return refuse(error, rank)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            where = f"{error.filename} " if error.filename else ""
            return refuse(CheckpointError(f"{where}cannot be written ({error.strerror}); mend it and run again"), rank)
        traceback.print_exc()
        return EXIT_INTERNAL


def preflight(config: Config) -> dict | None:
    """Checks config, data and folder; the summary of a run that has finished, else None."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    deepspeed_settings(config, world_size, num_parameters=0)
    if config.model.arch not in ARCHS:
        raise ConfigError(f"model.arch={config.model.arch!r} is not allowed; use one of {', '.join(ARCHS)}")
    train = check_splits(config.data)
    trackers.require(config)
    finished = run_folder.admit(config, world_size)
    run_folder.refuse_other_data(config, train.identity)
    if config.init_from and not (Path(config.run_dir) / "checkpoints").exists() and not Path(config.init_from).exists():
        raise ConfigError(f"init_from={config.init_from!r} does not exist; name a run's folder or a file of weights")
    return finished


def check_ports(config: Config) -> None:
    """The metrics' and that on which the ranks meet; a supervisor, where there is one, has seen to both."""
    if os.environ.get(exporter.FOLDER_VARIABLE):
        return
    exporter.listen(config.metrics.host, config.metrics.port).close()
    if tls := exporter.tls_of(config.metrics):
        tls.context()
    port = os.environ.get("MASTER_PORT")
    if port and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # else torchrun's agent listens on it
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise ConfigError(
                f"port {port}, on which the ranks meet, cannot be opened ({os.strerror(error.errno or 0)}), as where "
                "another training runs; give the launcher a free one: deepspeed --master_port PORT …"
            ) from None


def refuse(error: Expected, rank: int) -> int:
    """Rank 0 speaks; another rank of its node gives it time, since the launcher ends all when the first one leaves."""
    if rank != 0 and rank == int(os.environ.get("LOCAL_RANK", rank)):
        # The launcher's SIGTERM ends this wait when rank 0 has spoken; else the mistake is this rank's alone.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.sigtimedwait([signal.SIGUSR2], PATIENCE_S)
    print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
    return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
