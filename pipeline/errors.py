"""The errors of a run, and the exit code of each.

A rank ends with one of the codes below; the launcher and Kubernetes pass them on, so that a scheduler can tell a
mistake of the user (do not retry) from a request to stop (retry to continue). A second request of the same kind, 2 s or
more after the first, ends a rank at once, without a checkpoint. The code is then 128 plus the signal's number, such as
143 for SIGTERM (retry to continue).
"""

import errno

EXIT_DONE = 0
EXIT_USAGE = 64
EXIT_DATA = 65
EXIT_INTERNAL = 70
EXIT_STOPPED = 75


_OUTAGES = (
    *("ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "EIO", "ENETDOWN", "ENETRESET"),
    *("ENETUNREACH", "ENOLINK", "ENOTCONN", "EREMOTEIO", "ESHUTDOWN", "ESTALE", "ETIMEDOUT"),
)
OUTAGES = frozenset(getattr(errno, name) for name in _OUTAGES if hasattr(errno, name))
"""What the kernel answers while storage is gone: a server that was restarted, a cable, a FUSE process that died."""


def is_outage(error: OSError, *, was_writable: bool = False) -> bool:
    """Whether the storage is gone, which may pass, and is no mistake of the user.

    Args:
        was_writable: the place could be written before, so it is an outage too that it is read-only now.
    """
    return error.errno in OUTAGES or (was_writable and error.errno == errno.EROFS)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class if the message is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class ConfigError(ValueError):
    """The user asked for something impossible. The message is one line: what, got, allowed, how to mend it."""

    exit_code = EXIT_USAGE


class DataError(ValueError):
    """The data are not what their manifest says. The message is one line and names the file."""

    exit_code = EXIT_DATA


class StoreError(DataError):
    """Storage cannot be used now: a store of data is unreachable, slow or overloaded, or a file system is gone. What it
    holds need not be wrong.

    A later start may succeed, so this is not the user's mistake, and a scheduler may start the run again.
    """

    exit_code = EXIT_INTERNAL


class LostRankError(RuntimeError):
    """Another rank is gone, or did not answer for `train.timeout_s`: no collective can complete."""

    exit_code = EXIT_INTERNAL


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the earlier ones are intact."""

    exit_code = EXIT_INTERNAL


class DivergedError(RuntimeError):
    """Ranks hold different parameters."""

    exit_code = EXIT_INTERNAL


class NonFiniteError(ArithmeticError):
    """A loss or gradient is NaN or infinite; no update was made from it."""

    exit_code = EXIT_INTERNAL
