"""Where a data set is written: a local folder, or a URL that fsspec can write.

Workers always write into a local folder. For a URL that folder is scratch, and finished shards are uploaded from it
and deleted; an object store shows an object only when it is whole, which is what a rename does in a local folder.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import ConfigError, DataError
from pipeline.run_dir import atomic, locks

SCRATCH = ".tmp-"
"""Begins the names of copies that a source makes in the work folder for the time of a run."""
_LOCK_PATIENCE_S = 5.0  # workers of a run that was killed notice within a second or two


class Store(Protocol):
    """Files by name, such as `train/manifest.json`, below one folder or URL."""

    where: str
    """The folder or URL, for messages."""
    work: Path
    """Local folder that workers write below."""
    upload: bool
    """Whether `publish` has something to do."""

    def read(self, name: str) -> bytes | None:
        """The file's bytes, or None where there is none."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Puts a small file in place, whole or not at all."""
        ...

    def publish(self, names: list[str]) -> None:
        """Moves files from `work` to the URL, in order; does nothing for a local folder."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Names and bytes of the files directly in `folder`."""
        ...

    def remove(self, name: str) -> None:
        """Deletes the file if it is there."""
        ...

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Bytes `offset` to `offset + length` of the file; `DataError` where there is no file."""
        ...

    def fetch(self, name: str, folder: Path) -> Path:
        """A local path with the file's bytes, below `folder` where they had to be copied."""
        ...


def is_url(destination: str) -> bool:
    return "://" in destination


class LocalStore:
    """A folder of this machine."""

    upload = False

    def __init__(self, folder: str) -> None:
        self.where, self.work = folder, Path(folder)

    def read(self, name: str) -> bytes | None:
        try:
            return (self.work / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, data: bytes) -> None:
        path = self.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, data, sync=True)

    def publish(self, names: list[str]) -> None:
        pass

    def sizes(self, folder: str) -> dict[str, int]:
        try:
            with os.scandir(self.work / folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except FileNotFoundError:
            return {}

    def remove(self, name: str) -> None:
        (self.work / name).unlink(missing_ok=True)

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        try:
            with open(self.work / name, "rb") as file:
                return os.pread(file.fileno(), length, offset)
        except FileNotFoundError:
            raise DataError(f"{self.where}/{name} is missing") from None

    def fetch(self, name: str, folder: Path) -> Path:
        return self.work / name


class RemoteStore:
    """A URL that fsspec can write; `scratch` holds files before their upload."""

    upload = True

    def __init__(self, url: str, scratch: Path) -> None:
        self.where, self.work = url.rstrip("/"), scratch
        self._protocol = protocol = url.split("://", 1)[0]
        try:
            self._root = self._files._strip_protocol(self.where)
        except ImportError as error:
            extra = ": pip install chispike[s3]" if protocol in ("s3", "s3a") else ""
            raise ConfigError(f"{url}: the package for {protocol}:// is not installed ({error}){extra}") from None
        except ValueError:
            raise ConfigError(
                f"{url}: fsspec knows no protocol {protocol}://; use a folder, or s3:// and its like"
            ) from None

    @property
    def _files(self) -> Any:
        """fsspec's client. fsspec keeps one for each process: a client refuses to work in a forked one."""
        import fsspec  # not at the top: a local folder does not need it

        return fsspec.filesystem(self._protocol)

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:  # each protocol's client has exceptions of its own
            text = " ".join(str(error).split())[:300] or type(error).__name__
            raise DataError(f"{self.where}/{name}: {text}; mend that and run the same command again") from None

    def read(self, name: str) -> bytes | None:
        try:
            with self._errors(name):
                return self._files.cat_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        try:
            with self._errors(name):
                self._files.pipe_file(f"{self._root}/{name}", data)
        except FileNotFoundError as error:
            raise ConfigError(f"{self.where} cannot be written ({error}); create the bucket first") from None

    def publish(self, names: list[str]) -> None:
        for name in names:
            path = self.work / name
            try:
                with self._errors(name):
                    self._files.put_file(os.fspath(path), f"{self._root}/{name}")
            except FileNotFoundError as error:
                raise DataError(
                    f"{self.where}/{name} could not be uploaded ({error}); run the same command again"
                ) from None
            path.unlink()

    def sizes(self, folder: str) -> dict[str, int]:
        self._files.invalidate_cache()
        where = f"{self._root}/{folder}" if folder else self._root
        try:
            with self._errors(folder):
                found = self._files.ls(where, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {entry["name"].rsplit("/", 1)[-1]: entry["size"] or 0 for entry in found if entry["type"] == "file"}

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._errors(name):
            self._files.rm_file(f"{self._root}/{name}")

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        try:
            with self._errors(name):
                return self._files.cat_file(f"{self._root}/{name}", start=offset, end=offset + length)
        except FileNotFoundError:
            raise DataError(f"{self.where}/{name} is missing") from None

    def fetch(self, name: str, folder: Path) -> Path:
        path = folder / name.replace("/", "-")
        try:
            with self._errors(name):
                self._files.get_file(f"{self._root}/{name}", os.fspath(path))
        except FileNotFoundError:
            raise DataError(f"{self.where}/{name} is missing") from None
        return path


def make_store(destination: str, scratch: str | None = None) -> Store:
    """The store for a folder or URL.

    Args:
        scratch: local folder for files before their upload to a URL; the system's temporary folder by default.
    """
    if not destination:
        raise ConfigError("DIR is empty; give a folder or a URL")
    if not is_url(destination):
        return LocalStore(destination)
    base = Path(scratch or tempfile.gettempdir())
    return RemoteStore(destination, base / f"data_prep-{hashlib.sha256(destination.encode()).hexdigest()[:16]}")


@contextlib.contextmanager
def locked(store: Store) -> Iterator[None]:
    """Keeps a second run, and workers that a killed run left behind, out of the work folder."""
    try:
        store.work.mkdir(parents=True, exist_ok=True)
        handle = os.open(store.work, os.O_RDONLY | os.O_DIRECTORY)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"{store.work} is not a folder; give one that does not exist yet, or an empty one") from None
    except OSError as error:
        raise ConfigError(f"{store.work} cannot be created ({error.strerror}); give a folder you may write") from None
    try:
        if not locks.wait(handle, _LOCK_PATIENCE_S):
            raise ConfigError(f"another run is writing to {store.where}; wait for it, or give another folder")
        yield
        if store.upload:
            shutil.rmtree(store.work, ignore_errors=True)
    finally:
        os.close(handle)


def clear_temporary(store: Store, folders: list[str]) -> None:
    """Deletes the copies that sources made, and what interrupted writes left, in these folders of the work folder."""
    for folder in (store.work / name for name in folders):
        for path in [*folder.glob(f"{SCRATCH}*"), *atomic.unfinished(folder)]:
            if not path.is_dir():
                path.unlink(missing_ok=True)
