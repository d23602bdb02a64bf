"""Starts this node's ranks and looks after them, as PID 1 too:  python -m launch.supervise -- --recipe digits

One a node. It finds its place (place.py), meets the other nodes (gather.py), runs DeepSpeed's launcher (ranks.py),
passes a request to stop on to the ranks, starts them again when a rank or another node has died, serves /metrics,
/healthz and /readyz, and ends with a rank's exit code. Only rank 0's summary.json in the run's folder is success.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from launch import options
from launch.command import Parser
from launch.devices import CPU_RANKS
from launch.gather import SHOWN_S, Hello, MissingNodesError, gather
from launch.node_metrics import NodeMetrics
from launch.place import MASTER_PORT, Place, resolve
from launch.ranks import Ranks
from launch.signals import Signals
from pipeline import run_folder, run_lock, source
from pipeline.config import Config
from pipeline.data.manifest import Manifest
from pipeline.errors import EXIT_DATA, EXIT_DONE, EXIT_INTERNAL, EXIT_STOPPED, EXIT_USAGE, ConfigError, DataError
from pipeline.stops import SUPERVISED

ROOT = Path(__file__).parent.parent
TRAIN = Path(__file__).with_name("train.py")
POLL_S = 0.5
ALONE_S = 15.0
"""Ranks end together. When one has gone and others still run after so long, they wait for it in vain."""
NOT_BEGUN = (256 - signal.SIGTERM, 128 + signal.SIGTERM)
"""The launcher's code for a rank that our SIGTERM, its first, ended at once: one that had no step to save yet."""
FAREWELL_S = 60.0
"""For the ranks of other nodes to end and their supervisors to ask: a closed connection ends them in seconds."""
LEASE_S = 100.0
"""A network's file system may hold the lock of a machine that has died so long (NFS: 90 s)."""


def main(arguments: list[str]) -> int:
    signals = Signals()  # first of all: PID 1 would not hear a SIGTERM
    try:
        options_, train = command_line(arguments)
        config = options.parse(train)
        place = resolve(vars(options_), os.environ)
        place = replace(place, slots=place.slots or usual_slots(config, place.nodes))
        config.accumulation(place.nodes * place.slots)
        if options_.dry_run:
            return dry_run(place, train)
        return Supervisor(place, config, train, options_, signals).run()
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except OSError as error:  # a disk that is full, a folder that cannot be read
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_INTERNAL
    finally:
        signals.close()


def command_line(arguments: list[str]) -> tuple[Namespace, list[str]]:
    """Our own options, and behind `--` those of launch/train.py."""
    parser = Parser(
        prog="python -m launch.supervise",
        usage="python -m launch.supervise [options] -- --recipe NAME [--section.field VALUE …]",
        description="Starts this node's ranks and looks after them. Behind -- stand launch/train.py's options.",
        allow_abbrev=False,
    )
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes of the job [what the environment says, else 1]")
    parser.add_argument("--node-rank", dest="rank", type=int, metavar="K", help="this node, from 0")
    parser.add_argument("--master", metavar="HOST", help="name or address of node 0")
    parser.add_argument("--master-port", dest="port", type=int, help=f"a free port of node 0 [{MASTER_PORT}]")
    parser.add_argument("--slots", type=int, metavar="S", help="ranks on each node [its GPUs, or 2 without one]")
    parser.add_argument(
        "--max-restarts", type=int, default=3, metavar="R", help="of the ranks, without a new checkpoint [3]"
    )
    parser.add_argument(
        "--resolve-timeout", type=float, default=600, metavar="SECONDS", help="to wait for the other nodes [600]"
    )
    parser.add_argument(
        "--grace", type=float, default=120, metavar="SECONDS", help="for ranks to save when asked to stop [120]"
    )
    parser.add_argument("--metrics-host", default="0.0.0.0", metavar="ADDRESS", help="to serve on [0.0.0.0]")
    parser.add_argument("--metrics-port", type=int, default=9464, metavar="PORT", help="0 for any [9464]")
    parser.add_argument("--dry-run", action="store_true", help="only show place, hostfile, command and configuration")
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    ours, train = arguments[:cut], arguments[cut + 1 :]
    known = parser.parse_args(ours)
    for name, least in (("max_restarts", 0), ("resolve_timeout", 0), ("grace", 0), ("metrics_port", 0)):
        if not least <= getattr(known, name) < 1e6:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(known, name)} is not allowed; use {least} or more")
    if not train:
        raise ConfigError("no recipe: put -- and launch/train.py's options at the end: … -- --recipe digits")
    if "--dry-run" in train:
        raise ConfigError("--dry-run stands before --, among the supervisor's own options")
    return known, train


def usual_slots(config: Config, nodes: int) -> int:
    """Of this machine's GPUs as many as the batch divides over on all nodes; two CPU ranks (or one) without GPUs."""
    count = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    most = int(subprocess.run(count, capture_output=True, text=True, check=True).stdout) or CPU_RANKS
    micro_batches = config.data.global_batch // config.data.micro_batch
    return next((slots for slots in range(most, 0, -1) if micro_batches % (nodes * slots) == 0), most)


def introduction(place: Place, config: Config) -> tuple[Hello, ConfigError | DataError | None]:
    """What this node says of itself to the others, and what keeps it from training: its ranks would end, and those of
    the other nodes wait for them in vain.
    """
    identity, problem = "", None
    try:
        identity = Manifest.load(f"{config.data.path}/train").identity
        Manifest.load(f"{config.data.path}/val")
    except (ConfigError, DataError) as error:
        problem = error
    hello = Hello(
        node=place.rank,
        nodes=place.nodes,
        slots=place.slots,
        source=source.version(),
        data=identity[:16],
        problem=str(problem or "")[:1000],
        code=problem.exit_code if problem else EXIT_USAGE,
        host=socket.gethostname(),
    )
    return hello, problem


def launcher(place: Place, hostfile: Path, train: Sequence[str]) -> list[str]:
    """The command that starts this node's ranks."""
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning"]
    where = ["--master_port", str(place.port)]
    if place.nodes == 1:
        where += ["--num_accelerators", str(place.slots)]
    else:
        where += [
            "--hostfile",
            str(hostfile),
            "--no_ssh",
            "--node_rank",
            str(place.rank),
            "--master_addr",
            place.master,
        ]
    return [*deepspeed, *where, str(TRAIN), *train]


def newest_checkpoint(folder: Path) -> str:
    """The name of a run's newest checkpoint, which sorts by its step; empty where there is none."""
    try:
        return (folder / "checkpoints" / "latest").read_text().strip()
    except OSError:
        return ""


def dry_run(place: Place, train: list[str]) -> int:
    """Shows what would be started; the exit code of launch/train.py's own dry run."""
    print(
        f"place       node {place.rank} of {place.nodes}, {place.slots} ranks each, master {place.master}:{place.port}"
    )
    print("hostfile", *(f"  {line}" for line in place.hostfile.splitlines()), sep="\n")
    print("command    ", " ".join(launcher(place, Path("HOSTFILE"), train)), flush=True)
    command = [sys.executable, str(TRAIN), *train, "--dry-run", str(place.nodes * place.slots)]
    return subprocess.run(command, env=environment(), check=False).returncode


def environment(**variables: str) -> dict[str, str]:
    """The ranks': ours, and the program can be imported wherever it lies."""
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, **variables, "PYTHONPATH": f"{ROOT}:{path}" if path else str(ROOT)}


class Supervisor:
    """One node's part of one run."""

    def __init__(self, place: Place, config: Config, train: list[str], given: Namespace, signals: Signals) -> None:
        self._place, self._config, self._train, self._given = place, config, train, given
        self._folder = Path(config.run_dir)
        self._signals = signals
        self._restarts, self._saved = 0, ""
        """Of the ranks since a checkpoint came that is newer than `_saved`, the newest at the last restart."""

    def run(self) -> int:
        """Until the run has finished, was stopped, or cannot go on; the exit code."""
        with tempfile.TemporaryDirectory(prefix="chispike-") as folder:
            scratch, host, port = Path(folder), self._given.metrics_host, self._given.metrics_port
            metrics = NodeMetrics(self._config, self._place.rank, scratch, host, port, self._signals)
            self._say(f"metrics at {metrics.address}")
            code = EXIT_INTERNAL
            try:
                code = self._run(scratch, metrics)
            finally:
                metrics.close(code == EXIT_DONE)
            return code

    def _run(self, scratch: Path, metrics: NodeMetrics) -> int:
        hostfile = scratch / "hostfile"
        hostfile.write_text(self._place.hostfile)
        command = launcher(self._place, hostfile, self._train)
        hello, problem = introduction(self._place, self._config)
        if problem and self._place.nodes == 1:
            raise problem
        while not self._finished(0):
            try:
                if self._place.rank == 0:
                    self._await_lock()
                gather(self._place, hello, self._folder, self._given.resolve_timeout, self._signals, self._say)
            except (ConfigError, DataError) as refused:
                raise (problem or refused) from None
            except MissingNodesError as error:
                self._say(str(error))
                return EXIT_INTERNAL
            if self._signals.seen:
                self._say("stopped on request before the ranks were started; run again to continue")
                return EXIT_STOPPED
            metrics.ranks_run(True)
            ended = self._attend(Ranks(command, environment(**metrics.variables, **{SUPERVISED: str(os.getpid())})))
            metrics.ranks_run(False)
            if self._finished(SHOWN_S if ended == EXIT_DONE else 0):
                break
            if ended in (EXIT_USAGE, EXIT_DATA):
                self._tell(replace(hello, problem=f"its ranks ended with exit code {ended}, see there", code=ended))
            if ended in (EXIT_USAGE, EXIT_DATA, EXIT_STOPPED):
                return ended
            if self._signals.seen:
                return EXIT_STOPPED if ended in NOT_BEGUN else EXIT_INTERNAL
            if (newest := newest_checkpoint(self._folder)) > self._saved:
                self._restarts, self._saved = 0, newest
            why = "rank 0 left no summary.json" if ended == EXIT_DONE else f"exit code {ended}"
            if self._restarts == self._given.max_restarts:
                times = f"{self._restarts} times without a new checkpoint"
                self._say(f"the ranks ended ({why}) and were started again {times}: given up")
                return EXIT_INTERNAL
            self._restarts += 1
            metrics.restarted()
            self._say(f"the ranks ended ({why}): restart {self._restarts} of {self._given.max_restarts}")
        self._say(f"{self._folder} has finished")
        return EXIT_DONE

    def _attend(self, ranks: Ranks) -> int:
        """From the launcher's start to its end, with no process left behind; the launcher's exit code."""
        told: set[int] = set()
        most, alone_since, asked_at = 0, None, None
        try:
            while (ended := ranks.poll()) is None:
                self._signals.wait(POLL_S)
                now, living = time.monotonic(), ranks.living()
                most = max(most, len(living))
                alone_since = None if len(living) == most else alone_since or now
                if self._signals.seen:
                    if asked_at is None:
                        asked_at = now
                        self._say(f"{self._signals.first} received: the ranks are to save and stop")
                    ranks.send(signal.SIGTERM, living.keys() - told)  # once: twice would kill them
                    told |= living.keys()
                if asked_at is not None and (self._signals.urgent or now - asked_at > self._given.grace):
                    self._say("killing the ranks; what they had not saved is lost")
                    return EXIT_INTERNAL
                if alone_since is not None and now - alone_since > ALONE_S:
                    self._say(f"{most - len(living)} of {most} ranks have gone and the others wait: killing them")
                    return EXIT_INTERNAL
        finally:
            ranks.close()
        return ended

    def _tell(self, farewell: Hello) -> None:
        """Once more to the meeting, since the other nodes would wait there for this one: so they end as it does."""
        if self._place.nodes > 1:
            with suppress(ConfigError, DataError, MissingNodesError):  # what they were told, or they were not there
                gather(self._place, farewell, self._folder, FAREWELL_S, self._signals, self._say)

    def _await_lock(self) -> None:
        """Until rank 0 can have the run's folder to itself. Raises ConfigError where another run keeps it."""
        end, told = time.monotonic() + LEASE_S, False
        while not self._signals.seen:
            try:
                run_lock.hold(self._config.run_dir, patience_s=0).close()
                return
            except ConfigError as error:
                if time.monotonic() > end:
                    raise
                if not told:
                    self._say(f"waiting up to {LEASE_S:g} s: {error}")
                told = True
            self._signals.wait(POLL_S)

    def _finished(self, seconds: float) -> bool:
        """Whether rank 0 has left its marker in the run's folder, looked for `seconds` long."""
        end = time.monotonic() + seconds
        while run_folder.admit(self._config, self._place.nodes * self._place.slots) is None:
            if time.monotonic() > end:
                return False
            self._signals.wait(POLL_S)
        return True

    def _say(self, text: str) -> None:
        print(f"node {self._place.rank}: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
