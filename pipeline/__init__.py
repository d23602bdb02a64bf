"""chispike: distributed training of deep spiking networks, steered by χ."""

import sys

__version__ = "0.1.0"

OLDEST, NEWEST = (3, 10), (3, 13)
"""Versions of Python that everything is tested with; pyproject.toml says them to pip."""


def unsupported() -> "str | None":  # a string: an old Python, which this has to tell, could not evaluate it
    """Why training cannot run on this system or Python, in one line; None where it can.

    `from pipeline import chi` does not ask: it needs torch and numpy alone.
    """
    if sys.platform != "linux":
        return (
            f"this system is {sys.platform}, and training runs on Linux only, as DALI does; use Linux, or on Windows "
            "WSL 2 (χ for a training script of your own needs torch and numpy alone: docs/chi.md)"
        )
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        version = ".".join(map(str, sys.version_info[:3]))
        return f"Python {version} is not supported; use 3.10 to 3.13, as in: make PYTHON=python3.12"
    return None
