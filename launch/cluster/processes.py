"""This node's ranks, from the start of DeepSpeed's launcher to the end of the last process. Linux only (/proc).

A SIGTERM to the launcher would orphan the ranks. A Ctrl-C would end it with a traceback while they still save. And it
returns 0 when its second process is killed. So signals go to the ranks and not to the launcher. Orphans become children
of this process, which reaps them. Some tools signal the launcher all the same, with every process of the tree (Slurm's
proctrack/linuxproc): then the ranks save without it, and their own exit codes count.
"""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from launch.cluster.signals import STOPS, Signals
from pipeline.errors import EXIT_DONE, EXIT_INTERNAL, EXIT_STOPPED

POLL_S = 0.5
ALONE_S = 15.0
"""Ranks end together. When one has ended and others still run after this time, they wait for it in vain. Longer than
train.PATIENCE_S, the time that a rank gives rank 0 to print its error."""
NOT_BEGUN = 256 - signal.SIGTERM
"""The launcher's exit code where SIGTERM ended a rank at once, since that had no step to save yet. A rank that trains
ends on a second SIGTERM, with 128 + SIGTERM, and loses what it had not saved."""
REACHED_S = 2.0
"""A signal to the whole tree may end the launcher before it has reached this process: how long to wait for it."""
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The launcher sets them. Values that an outer launcher has set are removed: they would be taken for its own."""


class Process(NamedTuple):
    pid: int
    parent: int
    rank: str | None
    """RANK in its environment. Ranks have it, and so do the processes that a rank starts."""


class Processes:
    """A started launcher with its ranks; `close()` ends every process of it.

    Args:
        apart: in a session of its own, which no terminal and no signal to our process group reaches. Else the launcher
            stays in our group, with SIGINT blocked, and is killed when this process is: ranks that find their launcher
            gone save and stop.
    """

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], *, apart: bool = True) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        environ = {name: value for name, value in environ.items() if name not in RANK_VARIABLES}
        self._session = None
        self._ranks: set[int] = set()
        """Process ids that were ranks."""
        self._reaped: dict[int, int] = {}
        """Exit code of every process that this one has reaped, by process id: the launcher, and orphans."""
        if apart:
            self._launcher = subprocess.Popen(command, env=environ, start_new_session=True)
            self._session = self._launcher.pid
            return
        # The launcher's two processes inherit the block and keep it; ranks unblock SIGINT (ranks/stop_requests.py).
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            self._launcher = subprocess.Popen(
                command, env=environ, preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def poll(self) -> int | None:
        """Reaps what has ended, orphans too; the launcher's exit code once it has ended."""
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                self._reaped[ended[0]] = os.waitstatus_to_exitcode(ended[1])
        self._launcher.returncode = self._reaped.get(self._launcher.pid)
        return self._launcher.returncode

    def orphans_codes(self) -> list[int]:
        """The exit codes of the ranks that outlived their launcher and have ended; negative: a signal. Where none was
        seen alive, of all that this process has reaped beside the launcher.

        A process becomes an orphan when the last of the launcher has ended, a moment later: waits for it.
        """
        until = time.monotonic() + REACHED_S
        while True:
            self.poll()
            reaped = {pid: code for pid, code in self._reaped.items() if pid != self._launcher.pid}
            missing = self._ranks - reaped.keys() if self._ranks else not reaped
            if not missing or time.monotonic() > until:
                break
            time.sleep(0.02)
        return [code for pid, code in reaped.items() if pid in self._ranks] or list(reaped.values())

    def living(self) -> dict[int, int]:
        """The rank of each process that is one and still runs, by process id."""
        processes = {process.pid: process for process in self._processes()}
        ranks = {}
        for pid, process in processes.items():
            above = processes.get(process.parent)
            if process.rank is not None and (above is None or above.rank != process.rank):
                ranks[pid] = int(process.rank)
        self._ranks |= ranks.keys()
        return ranks

    def stopping(self) -> bool:
        """Whether ranks that outlive their launcher still save: those of our own group, which it died with."""
        return self._session is None and bool(self.living())

    def leave_alone(self, ranks: Iterable[int]) -> None:
        """Kills what is left of the launcher above these ranks: on SIGTERM it would kill them after 30 s each."""
        processes = {process.pid: process for process in self._processes()}
        above = {processes[pid].parent for pid in ranks if pid in processes}
        self.send(signal.SIGKILL, [pid for pid in above if pid in processes and processes[pid].rank is None])

    def send(self, number: int, pids: Iterable[int]) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def close(self) -> None:
        """Sends SIGKILL to all processes, the launcher first, until none is left."""
        while self.poll() is None or self._processes():
            if self._session is not None:
                with suppress(ProcessLookupError):
                    os.killpg(self._session, signal.SIGKILL)
            self.send(signal.SIGKILL, [process.pid for process in self._processes()])
            with suppress(ChildProcessError):
                os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)

    def _processes(self) -> list[Process]:
        """The living processes of the launcher's session; without a session, all descendants of this process."""
        found, parents = [], {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            with suppress(OSError):
                # "pid (name) state parent group session …": the name may hold spaces and brackets
                state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                parents[int(folder.name)] = int(parent)
                if state not in "ZX" and self._session in (None, int(session)):
                    found.append(folder)
        if self._session is None:
            found = [folder for folder in found if _descends(int(folder.name), parents)]
        return [process for folder in found if (process := _read(folder, parents)) is not None]


def _descends(pid: int, parents: Mapping[int, int]) -> bool:
    """Whether `pid` is a descendant of this process."""
    while pid in parents:
        pid = parents[pid]
        if pid == os.getpid():
            return True
    return False


def _read(folder: Path, parents: Mapping[int, int]) -> Process | None:
    """The process of a folder of /proc; None where it has just ended."""
    try:
        variables = (folder / "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    rank = next((v[5:].decode() for v in variables if v.startswith(b"RANK=")), None)
    return Process(int(folder.name), parents[int(folder.name)], rank)


def attend(ranks: Processes, signals: Signals, grace_s: float, say: Callable[[str], None]) -> int:
    """Waits for the launcher to end, and leaves no process behind; the launcher's exit code.

    A request to stop is passed on to the ranks. They are killed on a second request, `grace_s` after the first one, or
    ALONE_S after some of them have ended and the others have not. Where a signal has ended the launcher, and a request
    to stop comes with it, the ranks go on saving; the exit code is then theirs.
    """
    told: set[int] = set()
    most, alone_since, asked_at = 0, None, None  # most ranks at once; since when there are fewer; when asked to stop
    gone_at = None  # when a signal had ended the launcher
    try:
        while (ended := ranks.poll()) is None or ranks.stopping() or _outlived(ended, ranks, signals, gone_at):
            if ended is not None and gone_at is None:
                gone_at = time.monotonic()
            signals.wait(POLL_S)
            now, living = time.monotonic(), ranks.living()
            most = max(most, len(living))
            if len(living) == most:
                alone_since = None
            elif alone_since is None:
                alone_since = now
            if signals.seen:
                if asked_at is None:
                    asked_at = now
                    say(f"{signals.first} received: the ranks save and stop")
                if ended is not None:
                    ranks.leave_alone(living)
                ranks.send(signal.SIGTERM, living.keys() - told)  # once each: a second one would kill them
                told |= living.keys()
            if asked_at is not None and (signals.urgent or now - asked_at > grace_s):
                say("killing the ranks; what they had not saved is lost")
                return EXIT_INTERNAL
            if alone_since is not None and now - alone_since > ALONE_S:
                say(f"{most - len(living)} of {most} ranks have ended and the others wait for them: killing the others")
                return EXIT_INTERNAL
        signals.wait(0)  # it may have come since the last look
        return _of_orphans(ended, ranks.orphans_codes()) if ended <= EXIT_DONE and signals.seen else ended
    finally:
        ranks.close()


def _outlived(ended: int, ranks: Processes, signals: Signals, gone_at: float | None) -> bool:
    """Whether to wait for ranks that live on without their launcher: a request to stop has come, or may be coming.

    Args:
        ended: the launcher's exit code; above 0 it has ended by itself.
        gone_at: since when this is known.
    """
    if ended > EXIT_DONE or not ranks.living():
        return False
    return bool(signals.seen) or gone_at is None or time.monotonic() - gone_at < REACHED_S


def _of_orphans(ended: int, codes: Sequence[int]) -> int:
    """The exit code in the place of the launcher's, `ended`, where a request to stop has reached it as well.

    Args:
        codes: of the ranks that ended without it.
    """
    not_begun = {-number for number in STOPS}
    for code in codes:
        if code not in (EXIT_DONE, EXIT_STOPPED, *not_begun):
            return code if code > 0 else 256 + code
    if EXIT_STOPPED in codes:
        return EXIT_STOPPED
    return NOT_BEGUN if not_begun & set(codes) else ended


def why(ended: int) -> str:
    """What the launcher's exit code says, in words."""
    if ended == EXIT_DONE:
        return "rank 0 left no summary.json"
    number = 256 - ended if ended > 128 else -ended  # of a rank, or of the launcher itself
    if 0 < number < signal.SIGRTMIN and number in set(signal.Signals):
        out_of_memory = ", often for lack of memory" if number == signal.SIGKILL else ""
        return f"{'a rank' if ended > 0 else 'the launcher'} was ended by {signal.Signals(number).name}{out_of_memory}"
    return f"exit code {ended}"
