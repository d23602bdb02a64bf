"""launch/train.py with its loop watched for reads by the host, several runs in one process, for the real launcher.

RUNS holds a JSON list of [port on which the ranks meet, arguments]. Each run prints a JSON line: for every step what
was read, and where.
"""

import json
import os
from collections.abc import Iterator

from launch.train import main
from pipeline import train
from tests.support.host_reads import Read, watched
from tests.support.rank_lines import tell


def watch_loop() -> None:
    """Wraps the training loop; the program itself has no code for this."""
    loop = train.loop

    def watched_loop(run: train.Run) -> int:
        reads: list[Read] = []
        by_step: list[list[Read]] = []
        steps = run.loader.steps

        def noted(start: int, stop: int) -> Iterator:
            for micro_batches in steps(start, stop):
                reads.clear()
                yield micro_batches
                by_step.append(list(reads))  # when the loop asks for the next step

        run.loader.steps = noted
        with watched(reads):
            code = loop(run)
        tell("READS", by_step)
        return code

    train.loop = watched_loop


if __name__ == "__main__":
    watch_loop()
    for port, words in json.loads(os.environ["RUNS"]):
        os.environ["MASTER_PORT"] = str(port)
        if code := main(words):
            raise SystemExit(code)
