"""Starts and supervises this node's ranks; may be PID 1:  python -m launch.supervise -- --recipe digits

One supervisor for each node. It finds the node's place (cluster/placement.py), meets the other nodes
(cluster/rendezvous.py), runs DeepSpeed's launcher and passes stop requests on to the ranks (cluster/processes.py). It
restarts the ranks when a rank or another node has died, serves /metrics, /healthz and /readyz, and ends with a rank's
exit code. A run has succeeded only if rank 0 wrote summary.json into the run's folder.
"""

import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from launch import options
from launch.cluster import launcher
from launch.cluster.handshake import Hello, introduce, refusal
from launch.cluster.health import NodeMetrics
from launch.cluster.placement import MASTER_PORT, Placement, resolve
from launch.cluster.processes import NOT_BEGUN, POLL_S, Processes, attend, why
from launch.cluster.rendezvous import SHOWN_S, MissingNodesError, gather
from launch.cluster.signals import STOPS, Signals
from launch.command import Parser
from launch.devices import TorchError
from pipeline.config import Config
from pipeline.errors import (
    EXIT_DATA,
    EXIT_DONE,
    EXIT_INTERNAL,
    EXIT_STOPPED,
    EXIT_USAGE,
    ConfigError,
    DataError,
    StoreError,
)
from pipeline.metrics.exporter import USUAL_PORT
from pipeline.ranks.stop_requests import SUPERVISED
from pipeline.run_dir import caches, locks, outages, run_folder

FAREWELL_S = 60.0
"""How long a node that ends waits for the other supervisors, to tell them why: their ranks end within seconds, since a
connection closed. Longer than rendezvous.LINGER_S."""
LEASE_S = 330.0
"""How long a network file system may keep the lock of a dead machine (CephFS 300 s, NFS 90 s). Shorter than the default
of --resolve-timeout, during which the other nodes wait for node 0."""


def main(arguments: list[str]) -> int:
    signals = Signals()  # first of all: until then PID 1 ignores SIGTERM
    os.environ.update(caches.stand_ins(os.environ))
    try:
        options_, train = command_line(arguments)
        config = options.parse(train)
        place = resolve(vars(options_), os.environ)
        place = launcher.with_ranks(place, config, os.environ)
        config.accumulation(place.nodes * place.slots)
        if options_.dry_run:
            return dry_run(place, train)
        with outages.paused_by(signals.pause):
            return Supervisor(place, config, train, options_, signals).run()
    except (ConfigError, DataError, TorchError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except InterruptedError:
        print("stopped on request while storage was gone; run again to continue", file=sys.stderr, flush=True)
        return EXIT_STOPPED
    except OSError as error:  # a full disk, a folder that cannot be read
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_INTERNAL
    finally:
        signals.close()


def command_line(arguments: list[str]) -> tuple[Namespace, list[str]]:
    """The supervisor's own options, and the options of launch/train.py after `--`."""
    parser = Parser(
        prog="python -m launch.supervise",
        usage="python -m launch.supervise [options] -- (--recipe NAME | --config FILE | --resume RUN) "
        "[--section.field VALUE …]",
        description="Starts and supervises this node's ranks. launch/train.py's options follow after --.",
        allow_abbrev=False,
    )
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes of the job [what the environment says, else 1]")
    parser.add_argument("--node-rank", dest="rank", type=int, metavar="K", help="this node, from 0")
    parser.add_argument("--master", metavar="HOST[:PORT]", help="name or address of node 0")
    parser.add_argument("--master-port", dest="port", type=int, help=f"a free port of node 0 [{MASTER_PORT}]")
    parser.add_argument("--slots", type=int, metavar="S", help="ranks on each node [its GPUs, or 2 without one]")
    parser.add_argument(
        "--max-restarts", type=int, default=3, metavar="R", help="restarts of the ranks without a new checkpoint [3]"
    )
    parser.add_argument(
        "--resolve-timeout", type=float, default=600, metavar="SECONDS", help="time to wait for the other nodes [600]"
    )
    parser.add_argument(
        "--grace", type=float, default=120, metavar="SECONDS", help="time for ranks to save when asked to stop [120]"
    )
    parser.add_argument("--metrics-host", default="0.0.0.0", metavar="ADDRESS", help="where to serve metrics [0.0.0.0]")
    parser.add_argument(
        "--metrics-port", type=int, metavar="PORT", help=f"0 for any [{USUAL_PORT}, or any where it is taken]"
    )
    parser.add_argument("--dry-run", action="store_true", help="only show place, hostfile, command and configuration")
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    ours, train = arguments[:cut], arguments[cut + 1 :]
    known = parser.parse_args(ours)
    for name, least in (("max_restarts", 0), ("resolve_timeout", 0), ("grace", 0), ("metrics_port", 0)):
        if not least <= (getattr(known, name) or 0) < 1e6:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(known, name)} is not allowed; use {least} or more")
    if not train:
        raise ConfigError(
            "no recipe: put -- and launch/train.py's options at the end: … -- --recipe digits, or … -- --resume RUN"
        )
    if "--dry-run" in train:
        raise ConfigError("--dry-run stands before --, among the supervisor's own options")
    return known, train


def newest_checkpoint(folder: Path) -> str:
    """The name of a run's newest checkpoint; empty where there is none. Names sort by step.

    Raises:
        StoreError: the folder's storage is gone, and did not come back.
    """
    pointer = folder / "checkpoints" / "latest"
    try:
        return outages.outlast(pointer.read_text, str(pointer)).strip()
    except OSError:
        return ""


def dry_run(place: Placement, train: list[str]) -> int:
    """Shows what would be started; returns the exit code of launch/train.py's own dry run."""
    print(
        f"place       node {place.rank} of {place.nodes}, {place.slots} ranks each, master {place.master}:{place.port}"
    )
    print("hostfile", *(f"  {line}" for line in launcher.hostfile(place).splitlines()), sep="\n")
    print("command    ", " ".join(launcher.command(place, Path("HOSTFILE"), train)), flush=True)
    command = [sys.executable, str(launcher.TRAIN), *train, "--dry-run", str(place.nodes * place.slots)]
    return subprocess.run(command, env=launcher.environment(place, os.environ), check=False).returncode


def verdict(ended: int, *, asked: bool, tries_left: bool) -> int | None:
    """This node's exit code when its ranks have ended without a result; None: start them again.

    Args:
        ended: the launcher's exit code.
        asked: whether they had been asked to stop.
        tries_left: whether they may start again.
    """
    if ended in (EXIT_USAGE, EXIT_DATA, EXIT_STOPPED):
        return ended
    if asked:
        unsaved = ended == NOT_BEGUN or -ended in STOPS  # the launcher got the signal too: its ranks had not begun
        return EXIT_STOPPED if unsaved else EXIT_INTERNAL
    return None if tries_left else EXIT_INTERNAL


class Supervisor:
    """One node's part of one run."""

    def __init__(self, place: Placement, config: Config, train: list[str], given: Namespace, signals: Signals) -> None:
        self._place, self._config, self._train, self._given = place, config, train, given
        self._folder = Path(config.run_dir)
        self._signals = signals
        self._restarts, self._saved = 0, ""
        """Restarts of the ranks since the last new checkpoint, and the newest checkpoint at the last restart."""

    def run(self) -> int:
        """Returns when the run has finished, was stopped, or cannot go on; the exit code."""
        with tempfile.TemporaryDirectory(prefix="chispike-") as folder:
            scratch, host, port = Path(folder), self._given.metrics_host, self._given.metrics_port
            try:
                metrics = NodeMetrics(self._config, self._place.rank, scratch, host, port, self._signals)
            except ConfigError as error:
                self._tell(introduce(self._place, self._config).but(error))
                raise
            self._say(metrics.said)
            code = None
            try:
                code = self._run(scratch, metrics)
            except MissingNodesError as error:
                self._say(str(error))
            finally:  # no wait for a scrape after an error
                metrics.close(seen=code is not None)
            return EXIT_INTERNAL if code is None else code

    def _run(self, scratch: Path, metrics: NodeMetrics) -> int:
        hostfile = scratch / "hostfile"
        hostfile.write_text(launcher.hostfile(self._place))
        command = launcher.command(self._place, hostfile, self._train)
        variables = {**metrics.variables, SUPERVISED: str(os.getpid())}
        environ = launcher.environment(self._place, os.environ, **variables)
        hello = introduce(self._place, self._config)
        while hello.problem or not self._finished(0):
            self._meet(hello)
            if self._signals.seen:
                self._say("stopped on request before the ranks were started; run again to continue")
                return EXIT_STOPPED
            metrics.ranks_run(True)
            ended = attend(Processes(command, environ), self._signals, self._given.grace, self._say)
            metrics.ranks_run(False)
            try:
                if self._finished(SHOWN_S if ended == EXIT_DONE else 0):
                    break
                code = self._code(ended)
            except StoreError as error:
                self._tell(hello.but(error))
                raise
            if code is not None:
                why_not = self._explain(ended, code)
                if code in (EXIT_USAGE, EXIT_DATA, EXIT_INTERNAL):
                    self._tell(replace(hello, problem=why_not, code=code))
                return code
            self._restarts += 1
            metrics.restarted()
            self._say(f"the ranks ended ({why(ended)}): restart {self._restarts} of {self._given.max_restarts}")
        self._say(f"{self._folder} has finished")
        return EXIT_DONE

    def _meet(self, hello: Hello) -> None:
        """Waits for the other nodes; node 0 first waits for the lock of the run's folder. Raises as `gather` does."""
        if hello.problem and (self._folder / "summary.json").exists():
            raise refusal(hello.problem, hello.code)  # the other nodes have seen it and do not come
        if self._place.rank == 0 and not hello.problem:
            hello = hello.but(self._taken())
        gather(self._place, hello, self._folder, self._given.resolve_timeout, self._signals, self._say)

    def _code(self, ended: int) -> int | None:
        """As `verdict`, for ranks whose launcher has `ended`; a new checkpoint gives the restarts back."""
        if (newest := newest_checkpoint(self._folder)) > self._saved:
            self._restarts, self._saved = 0, newest
        tries_left = self._restarts < self._given.max_restarts
        return verdict(ended, asked=bool(self._signals.seen), tries_left=tries_left)

    def _explain(self, ended: int, code: int) -> str:
        """Why there is no further try, for other nodes; said here where the ranks and `attend` have not said it."""
        if code != EXIT_INTERNAL:
            return f"its ranks ended with exit code {ended}, see there"
        if self._signals.seen:
            line = f"the ranks ended before they had stopped as asked ({why(ended)})"
            if ended != EXIT_INTERNAL:
                self._say(line)
            return line
        times = f"{self._restarts} times without a new checkpoint"
        line = f"the ranks ended ({why(ended)}) and were started again {times}: given up"
        self._say(line)
        return line

    def _tell(self, farewell: Hello) -> None:
        """Meets the other nodes once more to tell them why this node ends. They end too, instead of waiting for it."""
        if self._place.nodes == 1:
            return
        with suppress(ConfigError, DataError, MissingNodesError):  # the error that was told, or no node came
            gather(self._place, farewell, self._folder, FAREWELL_S, self._signals, self._say)

    def _taken(self) -> ConfigError | StoreError | None:
        """Waits until rank 0 can lock the run's folder; the error where another run keeps the lock, or the folder's
        storage is gone; else None.
        """
        end, told = time.monotonic() + LEASE_S, False
        while not self._signals.seen:
            try:
                locks.hold(self._config.run_dir, patience_s=0).close()
                return None
            except StoreError as error:
                return error
            except ConfigError as error:
                if time.monotonic() > end:
                    return error
                if not told:
                    self._say(f"waiting up to {LEASE_S:g} s: {error}")
                told = True
            self._signals.wait(POLL_S)
        return None

    def _finished(self, seconds: float) -> bool:
        """Whether rank 0 has written summary.json into the run's folder; looks for it up to `seconds`."""
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
