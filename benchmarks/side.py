"""A side of a comparison: a process in its own Python environment that answers JSON lines with JSON lines."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

PEER = ("torch==2.13.0", "numpy", "spikingjelly==2.0.0")


def peer_python(given: str | None) -> str:
    """A Python that has SpikingJelly, `given` or one under build/peer, which is made at first use."""
    if given:
        return given
    home = Path("build/peer")
    python = home / "bin" / "python"
    if not python.exists():
        print(f"making the peer's environment in {home} …", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PEER], check=True)
    return str(python)


class Side:
    """A running script of this folder.

    Args:
        python: the environment's interpreter.
        script: file name in this folder; its first answer, to the job, has torch's version as `torch`.
        job: what the script is to build.
        environment: variables to add.
    """

    def __init__(self, python: str, script: str, job: dict, environment: Mapping[str, str] | None = None) -> None:
        here = Path(__file__).resolve().parent
        self.process = subprocess.Popen(
            [python, str(here / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": str(here.parent), **(environment or {})},
        )
        self.torch: str = self.ask(job)["torch"]

    def ask(self, question: object) -> dict:
        """The answer to one line; ends the benchmark if the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"a side of the benchmark ended with code {self.process.wait()}: {self.process.args}")
        return json.loads(answer)

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.wait()
