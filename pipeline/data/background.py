"""A pool of daemon threads: it runs calls in order, and a program that exits does not wait for it.

Python waits for a `ThreadPoolExecutor` at exit: a program that failed would first finish every queued download.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

_Result = TypeVar("_Result")
_Call = tuple[Future, Callable[..., Any], tuple]


class Background:
    """`num_threads` daemon threads."""

    def __init__(self, num_threads: int, *, name: str) -> None:
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._closed = threading.Event()
        self._guard = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True) for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[..., _Result], *arguments: object) -> Future[_Result]:
        """Queues `call(*arguments)`; after `close` the future is cancelled."""
        future: Future[_Result] = Future()
        with self._guard:  # else a call queued while `close` cancels the others would wait for ever
            if self._closed.is_set():
                future.cancel()
                future.set_running_or_notify_cancel()
            else:
                self._calls.put((future, call, arguments))
        return future

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call, arguments = item
            if self._closed.is_set():
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call(*arguments))
            except BaseException as error:  # whoever asks for the result raises it
                future.set_exception(error)

    def close(self, *, wait: bool) -> None:
        """Cancels calls that have not started. With `wait`, returns when the running ones have ended."""
        with self._guard:
            if not self._closed.is_set():
                self._closed.set()
                for _ in self._threads:
                    self._calls.put(None)
        if wait:
            for thread in self._threads:
                thread.join()
