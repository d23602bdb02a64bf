"""How a script that the launcher runs on every rank tells its results to the test that started it."""

import json
import os
import sys
from typing import NoReturn

import torch.distributed as dist


def tell(kind: str, result: object) -> None:
    """Rank 0 prints a result as a line. It is a single write, since all ranks share the pipe."""
    if dist.get_rank() == 0:
        sys.stdout.flush()
        os.write(sys.stdout.fileno(), f"\n{kind} {json.dumps(result)}\n".encode())


def told(output: str, kind: str) -> list:
    """The results of one kind, from the launcher's output."""
    return [json.loads(line.removeprefix(kind)) for line in output.splitlines() if line.startswith(kind + " ")]


def leave() -> NoReturn:
    """Ends a rank once all have printed: gloo's threads sometimes abort an interpreter that ends by itself."""
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
