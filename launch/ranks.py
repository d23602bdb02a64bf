"""This node's ranks, from the start of DeepSpeed's launcher to the end of the last process. Linux only (/proc).

The launcher runs in a session of its own, and its processes are found by it: a SIGTERM to the launcher would orphan the
ranks, and it returns 0 when its second half is killed. What is orphaned becomes this process's child and is reaped.
"""

import ctypes
import os
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

PR_SET_CHILD_SUBREAPER = 36
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The launcher sets them; what an outer launcher has set would be taken for them."""


class Process(NamedTuple):
    pid: int
    parent: int
    rank: str | None
    """RANK in its environment: of a rank, and of the processes that a rank starts."""


class Ranks:
    """A started launcher. `close()`, or no process of it is left alone."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str]) -> None:
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        environ = {name: value for name, value in environ.items() if name not in RANK_VARIABLES}
        self._launcher = subprocess.Popen(command, env=environ, start_new_session=True)

    def poll(self) -> int | None:
        """Reaps what has ended, orphans too; the launcher's exit code once it has ended."""
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._launcher.pid:
                    self._launcher.returncode = os.waitstatus_to_exitcode(ended[1])
        return self._launcher.returncode

    def living(self) -> dict[int, int]:
        """The ranks that run, by process id."""
        processes = {process.pid: process for process in self._processes()}
        ranks = {}
        for pid, process in processes.items():
            above = processes.get(process.parent)
            if process.rank is not None and (above is None or above.rank != process.rank):
                ranks[pid] = int(process.rank)
        return ranks

    def send(self, number: int, pids: Iterable[int]) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def close(self) -> None:
        """SIGKILL to all that is left, the launcher first, until nothing is left."""
        while self.poll() is None or self._processes():
            with suppress(ProcessLookupError):
                os.killpg(self._launcher.pid, signal.SIGKILL)
            self.send(signal.SIGKILL, [process.pid for process in self._processes()])
            with suppress(ChildProcessError):
                os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)

    def _processes(self) -> list[Process]:
        """The launcher's session without what has ended."""
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            with suppress(OSError):
                # "pid (name) state parent group session …", and a name may hold anything
                state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == self._launcher.pid and state not in "ZX":
                    variables = (folder / "environ").read_bytes().split(b"\0")
                    rank = next((v[5:].decode() for v in variables if v.startswith(b"RANK=")), None)
                    found.append(Process(int(folder.name), int(parent), rank))
        return found
