"""Which code this is, also where there is no git: in an image, or a copy on another node."""

import hashlib
from pathlib import Path

ROOMS = ("pipeline", "launch")


def version() -> str:
    """SHA-256, its first 16 digits, over every Python file of the program, by name."""
    digest, root = hashlib.sha256(), Path(__file__).parents[2]
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
