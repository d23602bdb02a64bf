"""Where caches lie, also without a home: no HOME, one that cannot be written, a user id that no list of users has.

Clusters start containers under such ids. What is put in the place of a home is a folder of the user's own in the
temporary directory, so matplotlib, triton, torch and our kernels find what they would end without, or warn of, there.
Nothing but the standard library.
"""

import contextlib
import os
import pwd
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

FOLDERS = {
    "MPLCONFIGDIR": "matplotlib",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "TRITON_CACHE_DIR": "triton/cache",
    "TRITON_HOME": "triton",
    "XDG_CACHE_HOME": "cache",
}
USERS = ("LOGNAME", "USER", "LNAME", "USERNAME")


def stand_ins(environ: Mapping[str, str]) -> dict[str, str]:
    """What this process's environment lacks to live without a home; empty where it has one. Call it before matplotlib
    or torch is imported, and update `os.environ` with it.
    """
    found = {}
    if not any(environ.get(name) for name in USERS) and not _known():
        found["LOGNAME"] = f"uid-{os.getuid()}"  # getpass.getuser, which torch asks, would fail
    home = _home(environ)
    if home is not None and _writable(home):
        return found
    folder = private()
    if home is None or not home.is_dir():
        found["HOME"] = str(folder)
    return found | {name: str(folder / sub) for name, sub in FOLDERS.items() if not environ.get(name)}


def line(found: Mapping[str, str]) -> str:
    """What was chosen and why, for people, where `stand_ins` has found something in the place of a home."""
    if "MPLCONFIGDIR" not in found:
        return ""
    return f"caches are kept in {Path(found['MPLCONFIGDIR']).parent}, since there is no home that can be written"


def folder() -> Path:
    """Our own: `chispike` in XDG_CACHE_HOME or ~/.cache, or in a temporary folder where neither can be written."""
    home = _home(os.environ)
    base = os.environ.get("XDG_CACHE_HOME") or (home / ".cache" if home else None)
    if base is not None:
        with contextlib.suppress(OSError):
            ours = Path(base) / "chispike"
            ours.mkdir(parents=True, exist_ok=True)
            if _writable(ours):
                return ours
    return private() / "cache" / "chispike"


def private() -> Path:
    """A folder in the temporary directory that nobody else can write: code is loaded from it.

    The same for every process of the user; a fresh one where another user has taken the name.
    """
    path = Path(tempfile.gettempdir()) / f"chispike-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = path.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
        return path
    return Path(tempfile.mkdtemp(prefix="chispike-"))


def _home(environ: Mapping[str, str]) -> Path | None:
    if environ.get("HOME"):
        return Path(environ["HOME"])
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return None


def _known() -> bool:
    try:
        return bool(pwd.getpwuid(os.getuid()))
    except KeyError:
        return False


def _writable(path: Path) -> bool:
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)
