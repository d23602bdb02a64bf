"""Forked workers that take tasks one at a time and die with their parent.

`concurrent.futures` is not used: its workers outlive a parent that was killed, and would write into the folder that
the next run is working on.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from pipeline.errors import DataError

_PARENT_CHECK_S = 1.0
_PR_SET_PDEATHSIG = 1  # of prctl(2), Linux


class StopRequestedError(Exception):
    """The user or the system asked the run to stop."""


@dataclass(frozen=True, slots=True)
class Event:
    """A worker's message: progress, or (with `done`) the result of a task."""

    task: Any
    done: bool
    value: Any


Report = Callable[[Any], None]
Work = Callable[[Any, Report], Any]


class _ParentGoneError(Exception):
    pass


def _die_with_parent() -> None:
    """Has the system kill this process when its parent ends, whatever the two are doing then.

    A worker inside a decoder cannot look for its parent. Where the system has no such call, `_serve` looks regularly.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(connection: Connection, work: Work, parent: int, others: Sequence[Connection]) -> None:
    """The worker's loop: a task in, its events and its result out."""
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C comes to the whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    _die_with_parent()
    for other in others:
        other.close()

    def report(value: object) -> None:
        if os.getppid() != parent:
            raise _ParentGoneError
        connection.send(("progress", value))

    try:
        if os.getppid() != parent:  # it ended before the call above
            return
        while True:
            while not connection.poll(_PARENT_CHECK_S):
                if os.getppid() != parent:
                    return
            task = connection.recv()
            try:
                answer = ("done", work(task, report))
            except OSError as error:
                answer = ("os_error", (error.errno, error.strerror or str(error), error.filename))
            except ValueError as error:
                answer = ("error", error)
            connection.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError, _ParentGoneError):
        return


def run_tasks(
    tasks: Iterable[Any], work: Work, num_workers: int, on_event: Callable[[Event], None], *, tick_s: float = 0.5
) -> None:
    """Runs `work(task, report)` for every task on `num_workers` forked processes.

    Args:
        tasks: handed out in order, one at a time.
        work: runs in a worker; what it closes over is inherited, its result must pickle.
        on_event: called in this process for every report and result. An exception from it ends the run.
        tick_s: `on_event` is called at least this often, with an empty event if nothing came.

    Raises:
        OSError, ValueError: `work` raised it.
        DataError: a worker died.
    """
    context = multiprocessing.get_context("fork")
    pending = list(tasks)[::-1]
    workers: dict[Connection, tuple[Any, Any]] = {}
    idle = []
    parent = os.getpid()
    try:
        for _ in range(min(num_workers, len(pending))):
            ours, theirs = context.Pipe()
            opened = [connection for connection, _ in workers.items()]
            process = context.Process(target=_serve, args=(theirs, work, parent, [ours, *opened]), daemon=True)
            process.start()
            theirs.close()
            workers[ours] = (process, None)
            idle.append(ours)
        while idle or any(task is not None for _, task in workers.values()):
            while idle and pending:
                connection, task = idle.pop(), pending.pop()
                workers[connection] = (workers[connection][0], task)
                connection.send(task)
            busy = [connection for connection, (_, task) in workers.items() if task is not None]
            if not busy:
                return
            ready = wait(busy, timeout=tick_s)
            for connection in ready:
                _receive(connection, workers, idle, on_event)
            if not ready:
                on_event(Event(None, False, None))
    finally:
        for process, _ in workers.values():
            process.kill()
        for connection, (process, _) in workers.items():
            process.join()
            connection.close()


def _receive(connection: Any, workers: dict, idle: list, on_event: Callable[[Event], None]) -> None:
    process, task = workers[connection]
    try:
        kind, value = connection.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        raise DataError(
            f"a worker process died (exit code {process.exitcode}; -9 is often the system short of memory); run the "
            "same command again, with fewer --workers if it comes back"
        ) from None
    if kind == "os_error":
        raise OSError(*value)
    if kind == "error":
        raise value
    if kind == "done":
        workers[connection] = (process, None)
        idle.append(connection)
    on_event(Event(task, kind == "done", value))
