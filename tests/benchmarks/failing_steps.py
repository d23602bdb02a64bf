"""Steps that go wrong, each in its way, for test_gpu_check.py; the runner calls them by name in a process each."""

import os
import signal
import time


def raises(findings, device) -> None:
    findings.check("before the error", True)
    raise ValueError("no such kernel")


def killed(findings, device) -> None:
    findings.check("before the kill", True)
    with findings.path.open("a") as file:
        file.write('{"name": "cut in the mi')
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(findings, device) -> None:
    time.sleep(10_000)


def stops_the_check(findings, device) -> None:
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(10_000)


def wrong(findings, device) -> None:
    def broken() -> None:
        raise AssertionError("3 of 8 spikes differ")

    findings.attempt("a kernel", broken)
    findings.figure("its speed", 123.25, "GB/s", 100.0)


def empty(findings, device) -> None:
    """Finds nothing at all."""


def fine(findings, device) -> None:
    findings.check("the last one", True)
    findings.facts(gpu="none")
