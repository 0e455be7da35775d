"""What users can put right, and how every other failure is put into one sentence."""

import errno


class UserError(Exception):
    """Something the user can fix.

    `message` names the value that is wrong and what is allowed; `hint` is the next command or the nearest name.
    The command line prints both on stderr and exits with code 2.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class LockedError(UserError):
    """Another process is at work on it."""


class Interrupted(KeyboardInterrupt):
    """Training stopped on request after a checkpoint; the message says where."""


class Preempted(Interrupted):
    """It was a scheduler's request (SIGTERM, SIGUSR1), and it has been met."""


class ElsewhereError(Exception):
    """Another process of the same command has ended with `code` and says why."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


class MismatchError(Exception):
    """What was made is not what it was made from; says by how much."""


class WorkerError(Exception):
    """A worker process failed for no reason that the user gave; carries what it printed."""


DONE, FAILED, USER, INTERRUPTED = 0, 1, 2, 130

_RESUME = "the last checkpoint is whole: the same command continues from it"


def explain(error: BaseException) -> tuple[int, str, str | None]:
    """Return exit code, sentence (empty: say nothing) and next step for an exception that ended a command."""
    if isinstance(error, ElsewhereError):
        return error.code, "", None
    if isinstance(error, UserError):
        return USER, error.message, error.hint
    if isinstance(error, Preempted):
        return DONE, str(error), None
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, str(error) or "interrupted; the same command continues", None
    if isinstance(error, BrokenPipeError):
        return FAILED, "the reader of the output went away", None
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FAILED, f"no space left on the disk{_file(error)}", f"free some space; {_RESUME}"
    if "No space left on device" in str(error) or "StorageFull" in str(error):
        return FAILED, "no space left on the disk", f"free some space; {_RESUME}"
    if isinstance(error, PermissionError):
        return USER, f"no permission{_file(error)}", None
    if isinstance(error, OSError):
        return FAILED, f"{error.strerror or error}{_file(error)}", _RESUME
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return FAILED, "out of memory", f"a smaller batch (stages.0.batch=...) needs less; {_RESUME}"
    if isinstance(error, MismatchError):
        return FAILED, str(error), None
    if isinstance(error, WorkerError):
        return FAILED, str(error), _RESUME
    return FAILED, f"{type(error).__name__}: {error}", "MSD_DEBUG=1 shows where; please report it"


def _file(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""
