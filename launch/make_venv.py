"""Makes a virtual environment with pip in it:  python3 launch/make_venv.py .venv

It needs the standard library alone, and its syntax is one that an older Python reads too. Debian and Ubuntu ship Python
without `ensurepip` (it is in python3-venv); there pip's wheel is downloaded from the package index, checked against its
hash, and installs itself.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
import venv
from pathlib import Path
from urllib.parse import urljoin

sys.path.insert(0, str(Path(__file__).parents[1]))

import pipeline

PIP_WHEEL = "pip-26.3-py3-none-any.whl"
PIP_SHA256 = "f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13"
DEFAULT_INDEX = "https://pypi.org/simple"


def fetch_pip(folder: Path) -> Path:
    """Downloads pip's wheel from the index that pip itself would use.

    Raises:
        OSError: the index cannot be reached, lacks the wheel, or served other bytes.
    """
    page = os.environ.get("PIP_INDEX_URL", DEFAULT_INDEX).rstrip("/") + "/pip/"
    request = urllib.request.Request(page, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        files = json.load(response)["files"]
    address = next((urljoin(page, file["url"]) for file in files if file["filename"] == PIP_WHEEL), None)
    if address is None:
        raise OSError(f"{page} has no {PIP_WHEEL}")
    with urllib.request.urlopen(address, timeout=60) as response:
        content = response.read()
    if hashlib.sha256(content).hexdigest() != PIP_SHA256:
        raise OSError(f"{address} is not the {PIP_WHEEL} that was expected")
    wheel = folder / PIP_WHEEL
    wheel.write_bytes(content)
    return wheel


def main(target: str) -> int:
    if pipeline.unsupported():
        print(f"error: {pipeline.unsupported()}", file=sys.stderr)
        return 64
    has_ensurepip = importlib.util.find_spec("ensurepip") is not None
    venv.create(target, with_pip=has_ensurepip, clear=True, symlinks=True)
    if has_ensurepip:
        return 0
    python = str(Path(target) / "bin" / "python")
    with tempfile.TemporaryDirectory() as folder:
        try:
            wheel = fetch_pip(Path(folder))
        except (OSError, ValueError, KeyError) as error:
            print(f"error: no pip here ({error}); run: apt-get install python3-venv", file=sys.stderr)
            return 70
        return subprocess.run(
            [python, f"{wheel}/pip", "install", "-q", "--no-index", str(wheel)], check=False
        ).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
