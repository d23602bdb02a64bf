"""Files behind URLs: http(s)://, s3:// and all other protocols of fsspec, with retries. Errors name the URL and cause.

Credentials and endpoints are not configured here: each protocol's client finds them itself (for s3 in the AWS
environment variables, such as `AWS_ENDPOINT_URL`; for http in ~/.netrc and HTTPS_PROXY).
"""

import errno
import os
import threading
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import ConfigError, DataError, StoreError

FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 30.0
RETRIES, TIMEOUT_S = 5, 30.0
_LOCAL = frozenset([errno.ENOSPC, errno.EDQUOT])  # errors of the local disk: a retry does not help
_FORBIDDEN = frozenset([401, 403])
_PASSING = frozenset([408, 425, 429])  # client errors (4xx) worth a retry: timeout, too early, too many requests

_Result = TypeVar("_Result")


class ClosedError(Exception):
    """The loader was closed during a download."""


class MismatchError(Exception):
    """A file arrived, but it is not the one that the manifest describes."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)


def join(folder: str | os.PathLike[str], *names: str) -> str:
    """A path below a folder or a URL."""
    return "/".join([os.fspath(folder).rstrip("/"), *names]) if is_remote(folder) else os.path.join(folder, *names)


class Remote:
    """A remote folder that files are read from.

    Args:
        url: of the folder.
        retries: further attempts after a failed one; the delay before each doubles, up to LONGEST_DELAY_S.
        timeout_s: seconds without a byte after which an attempt has failed, where the protocol's client can tell.

    Raises:
        ConfigError: the protocol is unknown, or its package is not installed.
    """

    def __init__(self, url: str, *, retries: int = RETRIES, timeout_s: float = TIMEOUT_S) -> None:
        self.url, self._retries = url, retries
        self.stopped = threading.Event()
        self._files = _file_system(url, timeout_s)

    def read(self, name: str) -> bytes:
        """The bytes of a small file.

        Raises:
            FileNotFoundError: the file does not exist.
            DataError: access is denied.
            StoreError: it could not be read in `retries` + 1 attempts.
        """
        url = join(self.url, name)
        return self._persist(url, lambda: self._files.cat_file(url))

    def fetch(self, name: str, path: str, check: Callable[[], None]) -> None:
        """Downloads a file to `path`; tries again while `check` raises MismatchError.

        Raises:
            DataError: it does not exist, access is denied, or `check` refused it in each of `retries` + 1 attempts.
            StoreError: it could not be read in `retries` + 1 attempts. Both name the URL and the last cause.
            OSError: of the local disk, such as ENOSPC.
            ClosedError: `stopped` was set.
        """
        url = join(self.url, name)

        def once() -> None:
            self._files.get_file(url, path, callback=_stopper(self.stopped))
            check()

        try:
            self._persist(url, once)
        except FileNotFoundError:
            raise DataError(f"{url} does not exist, though the manifest names it; upload the set again") from None

    def _persist(self, url: str, once: Callable[[], _Result]) -> _Result:
        delay = FIRST_DELAY_S
        for left in reversed(range(self._retries + 1)):
            try:
                return once()
            except (FileNotFoundError, ClosedError):
                raise
            except Exception as error:  # each protocol's client has its own errors; all are retried or raised
                status = _status(error)
                if isinstance(error, PermissionError) or status in _FORBIDDEN:
                    raise DataError(f"{url} may not be read ({error}); check the credentials") from None
                if isinstance(error, OSError) and error.errno in _LOCAL:
                    raise
                if left == 0:
                    wrong = isinstance(error, MismatchError) or (400 <= status < 500 and status not in _PASSING)
                    raise (DataError if wrong else StoreError)(
                        f"{url} could not be read in {self._retries + 1} attempts; the last failed with "
                        f"{type(error).__name__}: {error or 'no message'}"
                    ) from None
            if self.stopped.wait(delay):
                raise ClosedError
            delay = min(2 * delay, LONGEST_DELAY_S)
        raise AssertionError("the last attempt returns or raises")


def _status(error: Exception) -> int:
    """The HTTP status that a client's error holds, under the name that this client has for it; 0 for none."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status", "status_code", "code"):
            if isinstance(found := getattr(holder, name, None), int):
                return found
    return 403 if str(error).startswith("Forbidden") else 0  # gcsfs tells it by its text


def _stopper(stopped: threading.Event):
    from fsspec.callbacks import Callback

    class Stopper(Callback):
        def relative_update(self, inc: int = 1) -> None:
            if stopped.is_set():
                raise ClosedError

    return Stopper()


def _file_system(url: str, timeout_s: float):
    import fsspec  # not at the top: a run on local shards must not wait for this import

    protocol = url.split("://", 1)[0]
    options: dict[str, object] = {}
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        options["client_kwargs"] = {
            "trust_env": True,  # proxies of the environment, and ~/.netrc
            "timeout": ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s),
        }
    elif protocol == "s3":
        options["config_kwargs"] = {
            "connect_timeout": timeout_s,
            "read_timeout": timeout_s,
            "retries": {"total_max_attempts": 1},
        }
    try:
        files = fsspec.filesystem(protocol, **options)
        if protocol == "s3":
            files.retries = 1  # s3fs and boto would retry 5 times each: minutes of timeouts would become hours
        return files
    except ImportError as error:
        raise ConfigError(f"data.path={url!r} needs a package that is not installed: {error}") from None
    except ValueError as error:
        raise ConfigError(f"data.path={url!r} cannot be opened: {error}") from None
