"""Where caches go, also without a usable home: no HOME, a HOME that cannot be written, an unknown user id.

Clusters start containers with such ids. A folder of the user's own in the temporary directory then takes the place of
the home. Without it, matplotlib, triton, torch and our kernels would fail or warn. Standard library only.
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
    """Environment variables to set where the user has no usable home or no name; else empty.

    Call it before matplotlib or torch is imported, and update `os.environ` with the result.
    """
    found = {}
    if not any(environ.get(name) for name in USERS) and not _known():
        found["LOGNAME"] = f"uid-{os.getuid()}"  # else getpass.getuser, which torch calls, fails
    home = _home(environ)
    if home is not None and _writable(home):
        return found
    folder = private()
    if home is None or not home.is_dir():
        found["HOME"] = str(folder)
    return found | {name: str(folder / sub) for name, sub in FOLDERS.items() if not environ.get(name)}


def line(found: Mapping[str, str]) -> str:
    """A line for the console about where caches go, if `stand_ins` had to replace the home; else empty."""
    if "MPLCONFIGDIR" not in found:
        return ""
    return f"caches are kept in {Path(found['MPLCONFIGDIR']).parent}, since there is no home that can be written"


def folder() -> Path:
    """Our cache folder, `chispike`: in XDG_CACHE_HOME or ~/.cache, or in a temporary folder if these are read-only."""
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
    """A folder in the temporary directory that no other user can write to, since code is loaded from it.

    It is the same for every process of the user, and a fresh one if another user has taken its name.
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
