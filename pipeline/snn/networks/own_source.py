"""Where the code of a user's own network lies: `model.arch` as package.module:function or .../file.py:function.

It does not import torch: a mistake is found before anything is started.
"""

import hashlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pipeline.config.checks import require
from pipeline.errors import ConfigError, first_line
from pipeline.run_dir import code_version, run_folder
from pipeline.snn.networks.archs import ARCHS

FORMS = "package.module:function or path/to/file.py:function"
ROOT = Path(__file__).resolve().parents[3]
NOT_THEIRS = (
    *(ROOT / room for room in (*code_version.ROOMS, "data_prep")),
    Path(sysconfig.get_path("stdlib")).resolve(),
)
"""Folders of our program and of Python's library, which may lie below that of the user's file."""


class Source(NamedTuple):
    """A file of Python, and the function in it that builds the network."""

    arch: str
    """`model.arch`, which named it."""
    module: str
    """Name to import it by; empty for a file that belongs to no package."""
    path: Path
    function: str
    code: bytes = b""
    """What the file holds."""

    @property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.code).hexdigest()

    @property
    def folder(self) -> Path:
        """The folder of the file, or of the package: the code below it is the user's."""
        if not self.module:
            return Path(os.path.abspath(self.arch.rpartition(":")[0])).parent
        depth = self.module.count(".") + (self.path.name == "__init__.py")
        return self.path.absolute().parents[max(depth - 1, 0)]


def check(arch: str) -> None:
    """Raises ConfigError where `arch` is neither a name of a network nor has the form of one's own."""
    place, _, function = arch.rpartition(":")
    own = bool(place) and function.isidentifier() and (place.endswith(".py") or _is_dotted(place))
    require(own or arch in ARCHS, "model.arch", arch, f"one of {', '.join(ARCHS)}; or your own, as {FORMS}")


def find(arch: str, run: Path | None = None) -> Source | None:
    """The file that `arch` names; None where it is the name of a network of this package.

    Args:
        arch: `model.arch`.
        run: folder of a run. The copy of a single file in it is taken instead: it is what was trained.

    Raises:
        ConfigError: there is no such file or module, or it is not Python.
    """
    if ":" not in arch:
        return None
    place, _, function = arch.rpartition(":")
    if not place.endswith(".py"):
        source = _module(arch, place, function)
    elif run is not None and (run / run_folder.NETWORK).is_file():
        source = Source(arch, "", run / run_folder.NETWORK, function)
    else:
        source = _file(arch, place, function)
    try:
        code = source.path.read_bytes()
        compile(code, str(source.path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ConfigError(f"model.arch={arch!r}: {source.path}{line} is no Python ({first_line(error)})") from None
    except OSError as error:
        raise ConfigError(f"model.arch={arch!r}: {source.path} cannot be read ({error.strerror})") from None
    return source._replace(code=code)


def theirs(source: Source, files: Iterable[str]) -> dict[str, str]:
    """Which of these files are of the user's code, and no library's: by file, its path below `source.folder`."""
    found, folders = {}, (source.folder, source.folder.resolve())
    for file in files:
        path = Path(os.path.abspath(file))
        folder = next((one for one in folders if str(path).startswith(f"{one}{os.sep}")), None)
        if folder is not None:
            below = path.relative_to(folder)
            installed = {"site-packages", "dist-packages"} & set(below.parts)
            if not installed and not set(NOT_THEIRS) & set(path.resolve().parents):
                found[file] = below.as_posix()
    return found


def imported(source: Source) -> dict[str, str]:
    """SHA-256 of every other file of the user's code that this process has imported, by its path below
    `source.folder`. Call it once the network is built."""
    files = [(getattr(module, "__dict__", None) or {}).get("__file__") for module in list(sys.modules.values())]
    digests = {}
    for file, name in theirs(source, (file for file in files if isinstance(file, str))).items():
        if os.path.isfile(file) and not os.path.samefile(file, source.path):
            digests[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return dict(sorted(digests.items()))


def look_first_in(folder: str) -> None:
    """Makes `folder` the first to import from, as Python does with that of a script; no longer that of our script,
    whose files are imported by the name of their room."""
    sys.path[:] = [folder, *(one for one in sys.path if one not in (folder, str(ROOT / "launch")))]


def _file(arch: str, place: str, function: str) -> Source:
    path = Path(place)
    if not path.is_file():
        raise ConfigError(
            f"model.arch={arch!r}: there is no file {path.absolute()} on this machine; every node needs it at this "
            "path, seen from the folder that it starts in"
        )
    return Source(arch, "", path, function)


def _module(arch: str, place: str, function: str) -> Source:
    look_first_in(os.getcwd())
    try:
        spec = importlib.util.find_spec(place)
    except Exception as error:  # whatever a package's __init__.py may raise
        raise ConfigError(f"model.arch={arch!r}: {place} cannot be imported ({first_line(error)})") from error
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ConfigError(
            f"model.arch={arch!r}: there is no module {place} on this machine; install it on every node, start in the "
            "folder that holds it, or name a file, as path/to/file.py:function"
        )
    return Source(arch, place, Path(spec.origin), function)


def _is_dotted(place: str) -> bool:
    return all(part.isidentifier() for part in place.split("."))
