"""What can go wrong, and the exit code that says so.

A rank ends with one of the codes below; the launcher and Kubernetes pass them on, so that a scheduler can tell a
mistake of the user (do not retry) from a request to stop (retry to continue). A second request of the same kind, 2 s or
more after the first, ends a rank at once, without a checkpoint: 128 and the signal's number, as 143 for SIGTERM (retry
to continue).
"""

EXIT_DONE = 0
EXIT_USAGE = 64
EXIT_DATA = 65
EXIT_INTERNAL = 70
EXIT_STOPPED = 75


def first_line(error: BaseException) -> str:
    """What an error says, for a message of one line; its class where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class ConfigError(ValueError):
    """The user asked for something impossible. The message is one line: what, got, allowed, how to mend it."""

    exit_code = EXIT_USAGE


class DataError(ValueError):
    """The data are not what their manifest says. The message is one line and names the file."""

    exit_code = EXIT_DATA


class StoreError(DataError):
    """The data could not be read now, and nothing says that they are wrong: their store is away, slow or overloaded.

    A later start may read them, so it is no mistake of the user, and a scheduler starts the run again.
    """

    exit_code = EXIT_INTERNAL


class LostRankError(RuntimeError):
    """Another rank is gone, or silent for `train.timeout_s`: no collective can end."""

    exit_code = EXIT_INTERNAL


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; those before it are whole."""

    exit_code = EXIT_INTERNAL


class DivergedError(RuntimeError):
    """Ranks hold different parameters."""

    exit_code = EXIT_INTERNAL


class NonFiniteError(ArithmeticError):
    """A loss or gradient is NaN or infinite; no update was made from it."""

    exit_code = EXIT_INTERNAL
