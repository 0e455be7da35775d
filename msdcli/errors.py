"""What users can put right, and how every other failure is put into one sentence."""

import contextlib
import errno
import json
import re
import shlex
import sys
from collections.abc import Iterator


class UserError(Exception):
    """Something the user can fix.

    `message` names the value that is wrong and what is allowed; `hint` is the next command or the nearest name.
    The command line prints both on stderr and exits with code 2. In Python the hint is a note of the exception, in
    Python's words.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint:
            self.add_note(f"try: {in_python(hint)}")


class WrongValueError(UserError, ValueError):
    """A value that means nothing here; for callers in Python a ValueError too."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that is not where it is said to be; for callers in Python a FileNotFoundError too."""

    def __str__(self) -> str:
        return self.message


class LockedError(UserError):
    """Another process is at work on it."""


class ElsewhereUnfinishedError(LockedError):
    """All that is left of a run is being done by other processes: nothing is there to put right."""


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


# A command with all its words, which stays what it is, or an option outside of one, with its value if that follows.
_OPTION = re.compile(
    r"\b(?:msd|pip|git|hf) [^,;()]*|--(?P<name>[a-z][a-z-]*)"
    r"""(?: (?!or\b|and\b)(?P<value>(?:'[^']*'|"[^"]*"|,(?=\S)|[^\s,;()'"\\])+))?"""
)
_LISTS = {"group": "groups", "prompt": "prompts"}  # options that are said more than once, and what they are in Python


def in_python(hint: str) -> str:
    """Return a hint whose options are keywords: `--out given.pdf` is `out="given.pdf"`; commands stay.

    For that a word follows an option only where it is its value: "a new file with --out".
    """

    def keyword(found: re.Match[str]) -> str:
        if found["name"] is None:
            return found[0]
        name = found["name"].replace("-", "_")
        given = found["value"] or ""
        said = given.rstrip(".")
        if not said:
            return "aot=True" if name == "aot" else f"`{_LISTS.get(name, name)}`"
        value = _literal(shlex.split(said)[0])
        if name == "classes":
            value = f"[{', '.join(map(_literal, said.split(',')))}]"
        elif name in _LISTS:
            name, value = _LISTS[name], f"[{value}]"
        return f"{name}={value}{given[len(said) :]}"

    return _OPTION.sub(keyword, hint)


def _literal(text: str) -> str:
    return text if text.isdecimal() else json.dumps(text, ensure_ascii=False)


# 75 is EX_TEMPFAIL of sysexits.h: try again later. 141 is what a shell says of a program that SIGPIPE ended.
DONE, FAILED, USER, STOPPED, INTERRUPTED, READER_GONE = 0, 1, 2, 75, 130, 141

WHOLE = "the last checkpoint is whole: the same command continues from it"
CONTINUES = "the same command continues"
_RESUME = "resume"  # the attribute of an exception that says how to go on
# What the system says of a place that the user named, and that another place cures.
_PLACES = (errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def resumable(how: str) -> Iterator[None]:
    """Say, of whatever ends the block, how to go on; the innermost block knows best."""
    try:
        yield
    except BaseException as error:
        if getattr(error, _RESUME, None) is None:
            setattr(error, _RESUME, how)
        raise


# None of these changes what is learnt, as a smaller `batch` of a stage would.
_LESS_MEMORY = (
    "less at once: micro_batch=... for training, evaluation.batch=... for sampling and measuring, "
    "workers=1 for fewer students on a device"
)
# What torch, CUDA and its libraries (cuBLAS, cuDNN, cuSOLVER, NCCL) say; a handle of cuBLAS that could not be made had
# no memory, and so had cuDNN where it finds no engine for a convolution that it otherwise computes.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemory|ALLOC_FAILED|ALLOCATION_FAILED|can't allocate memory|not enough memory|bad_alloc"
    r"|CUBLAS_STATUS_NOT_INITIALIZED|unable to find an engine to execute",
    re.IGNORECASE,
)
_CUDA_ALLOCATION = 2  # cudaErrorMemoryAllocation
_AMOUNT = r"([\d.]+ ?(?:[KMGT]i?B|bytes))"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that host or device have too little memory, in any of the forms of torch and its libraries."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError):
        return False
    codes = (getattr(error, "error_code", None), *error.args[1:2])  # of torch.AcceleratorError
    coded = type(error).__name__ == "AcceleratorError" and _CUDA_ALLOCATION in codes
    return coded or _OUT_OF_MEMORY.search(str(error)) is not None


def _memory(error: BaseException) -> str:
    """Say what was asked for, and what is free: as the error tells, or else as the device does."""
    text = str(error)
    asked = re.search(rf"(?:tried to allocate|unable to allocate) {_AMOUNT}", text, re.IGNORECASE)
    told = re.search(rf"capacity of {_AMOUNT} of which {_AMOUNT} is free", text)
    free = (told[2], told[1]) if told else _free_on_gpu() if isinstance(error, RuntimeError) else None
    said = [f"{_readable(asked[1])} more were asked for"] if asked else []
    said += [f"{free[0]} of {free[1]} are free"] if free else []
    return f"out of memory: {', '.join(said)}" if said else "out of memory"


def _free_on_gpu() -> tuple[str, str] | None:
    """Return what is free and all there is of the GPU that this process computes on; None without one."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is None or not cuda.is_initialized():
        return None
    try:
        free, whole = cuda.mem_get_info()
    except RuntimeError:  # a device that failed may answer nothing any more
        return None
    return _gib(free), _gib(whole)


def _readable(amount: str) -> str:
    count = amount.removesuffix("bytes").strip()
    return _gib(int(count)) if amount.endswith("bytes") and count.isdecimal() else amount


def _gib(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB"


def explain(error: BaseException) -> tuple[int, str, str | None]:
    """Return exit code, sentence (empty: say nothing) and next step for an exception that ended a command."""
    if isinstance(error, ElsewhereError):
        return error.code, "", None
    if isinstance(error, ElsewhereUnfinishedError):
        return STOPPED, error.message, error.hint
    if isinstance(error, UserError):
        return USER, error.message, error.hint
    if isinstance(error, Preempted):
        return STOPPED, str(error), None
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, str(error) or "interrupted; the same command continues", None
    if isinstance(error, BrokenPipeError):
        return READER_GONE, "", None
    resume: str | None = getattr(error, _RESUME, None)
    then = f"; {resume}" if resume else ""
    if is_out_of_memory(error):
        return FAILED, _memory(error), f"{_LESS_MEMORY}{then}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FAILED, f"no space left on the disk{_file(error)}", f"free some space{then}"
    if "No space left on device" in str(error) or "StorageFull" in str(error):
        return FAILED, "no space left on the disk", f"free some space{then}"
    if isinstance(error, PermissionError):
        return USER, f"no permission{_file(error)}", None
    if isinstance(error, OSError) and error.errno in _PLACES:
        return USER, f"{_said(error)}{_file(error)}", "another place (run=..., --out ...)"
    if isinstance(error, OSError):
        return FAILED, f"{_said(error)}{_file(error)}", resume
    if isinstance(error, MismatchError):
        return FAILED, str(error), None
    if isinstance(error, WorkerError):
        return FAILED, str(error), resume
    return FAILED, f"{type(error).__name__}: {error}", "MSD_DEBUG=1 shows where; please report it"


def _said(error: OSError) -> str:
    """Return what the system says, as the beginning of a sentence."""
    said = error.strerror or str(error)
    return said[:1].lower() + said[1:]


def _file(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""
