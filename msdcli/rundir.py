"""Every name inside a run directory, atomic writes, locks and the record of what has been done."""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import hashlib
import json
import os
import shlex
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from msdcli.errors import LockedError, MissingFileError, UserError
from msdcli.recipe import Recipe, load
from msdcli.recipe.changes import differences, differing, value_at

TEMPORARY, WRITER = ".tmp", ".writer"  # of folders that something is written in, and of the lock in them


class RunDir:
    """The run directory at `root`; nothing is created until something is written."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.recipe_file = root / "recipe.yaml"
        self.record_file = root / "run.json"
        self.flops_file = root / "flops.json"  # what the parts of the run cost, for whoever says how long is left
        self.partition = root / "partition.json"
        self.teacher = root / "teacher"
        self.prompts = root / "prompts"
        self.pairs = root / "pairs"
        self.classifier = root / "classifier"
        self.students = root / "students"
        self.samples = root / "samples"
        self.metrics = root / "metrics"
        self.watched = self.metrics / "watch.jsonl"
        self.export = root / "export"
        self.logs = root / "logs"
        # Artifacts that runs share, by the hash of what they depend on.
        self.shared = root.parent / ".shared"

    def student(self, number: int) -> Path:
        """The folder of one student; whoever trains it holds its lock."""
        return self.students / str(number)

    def stage(self, student: int, number: int, objective: str) -> Path:
        """The folder of one stage of one student; `number` counts the stages from 0."""
        return self.student(student) / f"{number}-{objective}"

    def folders(self) -> list[Path]:
        """The folders that msd has written to, down to the students' stages."""
        return [f for pattern in ("*/", "students/*/", "students/*/*/") for f in sorted(self.root.glob(pattern))]

    def searched(self, student: int | None = None) -> Path:
        """The file of the network that was found for a target: of all students, or of one and those of its size."""
        return self.root / ("student.json" if student is None else f"student-{student}.json")

    def results(self) -> list[Path]:
        """The result files of the measurements so far."""
        return sorted(self.metrics.glob("*.json"))

    def recipe(self) -> Recipe:
        """Return the recipe of this run. UserError if this is no run directory."""
        if not self.recipe_file.is_file():
            raise MissingFileError(
                f"{self.root} is not a run directory: it has no recipe.yaml", hint="msd distill RECIPE makes one"
            )
        return load(self.recipe_file)

    def adopt(self, recipe: Recipe) -> None:
        """Make this the run of `recipe`. UserError where it belongs to another; then nothing is written."""
        self.check(recipe)
        write_text(self.recipe_file, recipe.to_yaml())

    def who_is_at_work(self) -> str:
        """Return who holds a student, as a phrase."""
        held = (holder_of(folder) for folder in sorted(self.students.glob("*/")))
        return next((who for who in held if who), "another process")

    def begun(self) -> bool:
        """Whether anything has been made of the run that another recipe could not make again for nothing: students, or
        results. A teacher, and what else runs share, is kept beside them.
        """
        return any(self.students.glob("*/*/[!.]*")) or bool(self.results())

    def is_of(self, recipe: Recipe) -> bool:
        """Whether there is a run of this very recipe, which goes on; another's that made nothing yet is taken over."""
        return self.recipe_file.is_file() and not differences(self.recipe().dump(), recipe.dump())

    def check(self, recipe: Recipe) -> None:
        """Raise UserError unless the directory is free, the run of this very recipe, or a run that made nothing yet."""
        if self.recipe_file.exists():
            if not self.begun():
                return
            if changed := differences(before := self.recipe().dump(), after := recipe.dump()):
                raise UserError(
                    f"{self.root} belongs to another recipe: {', '.join(changed)} differ\n"
                    + "\n".join(f"  {key}: {_brief(before, key)} there, {_brief(after, key)} here" for key in changed),
                    hint=_under_another_name(self.root, before, after),
                )
        elif self.root.is_dir() and any(not file.name.startswith(".") for file in self.root.iterdir()):
            raise UserError(
                f"{self.root} exists and is not a run directory", hint="give the run another name (name=...)"
            )


def begun_otherwise(run: RunDir, what: str) -> UserError:
    """The refusal of a run whose `data` or `teacher` are others than when it was begun."""
    return UserError(
        f"{run.root} was begun with other weights of the teacher"
        if what == "teacher"
        else f"{run.root} was begun with other data: their content has changed",
        hint=f"bring the {what} back, or give the run another name (name=...)",
    )


def _brief(tree: dict[str, Any], key: str) -> str:
    """Return the value at a dotted key as one writes it in an override."""
    try:
        value = value_at(tree, key)
    except (KeyError, IndexError, TypeError):
        return "nothing"
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    return text if len(text) <= 60 else f"{text[:57]}..."


def _under_another_name(root: Path, before: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Return a command that begins the wanted recipe as a run of its own: all in which it differs from the one there,
    what a run may change as well.
    """
    number = next(n for n in range(2, 10_000) if not root.with_name(f"{root.name}-{n}").exists())
    name = f"{root.name}-{number}"
    given = [f"{key}={_brief(wanted, key)}" for key in differing(before, wanted) if key not in ("name", "run")]
    if any(text.endswith(("=nothing", "...")) for text in given):
        return f"give the run another name: the same command with name={name}"
    where = [] if before["run"] is None and wanted["run"] is None else [f"run={root.with_name(name)}"]
    return f"msd distill {shlex.join([str(root / 'recipe.yaml'), f'name={name}', *where, *given])}"


def key(*parts: Any) -> str:
    """Return a short name for what an artifact depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Give a temporary file for `path` to write to; at the end it is synced and takes the name, or is removed."""
    with place_beside(path) as place:
        temporary = place / path.name
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)
        os.replace(temporary, path)
        _sync_folder(path.parent)


def discard(path: Path) -> None:
    """Remove a file, or a folder in one piece: nobody ever finds half of it there."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    with place_beside(path) as place:
        os.replace(path, place / path.name)


@contextlib.contextmanager
def building(folder: Path) -> Iterator[Path]:
    """Give a temporary folder for `folder` to fill; at the end it takes the place of `folder`, or is removed."""
    folder = folder.absolute()
    with place_beside(folder) as place:
        temporary = place / folder.name
        temporary.mkdir()
        yield temporary
        os.chmod(temporary, 0o777 & ~_UMASK)
        _sync_folder(temporary)
        if folder.exists():
            os.replace(folder, place / ".before")
        os.replace(temporary, folder)
        _sync_folder(folder.parent)


@contextlib.contextmanager
def place_beside(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path` with a lock in it: as long as the writer lives, nobody takes it for a
    leftover. The lock is a file of its own, for a library may put a new file in the place of the one it was given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, place = _locked_folder(path)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(handle)


def _locked_folder(path: Path) -> tuple[int, Path]:
    while True:
        place = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent))
        with contextlib.suppress(FileNotFoundError):  # swept before it was locked
            handle = os.open(place / WRITER, os.O_CREAT | os.O_RDWR)
            fcntl.flock(handle, fcntl.LOCK_EX)
            if (place / WRITER).exists():
                return handle, place
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one piece."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one piece."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file that msd wrote. UserError if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}", hint="remove it, and the same command makes it again") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a .jsonl that msd writes, also while it does: what is cut off or damaged is left out."""
    return [line for line in parsed_lines(path) if line is not None]


def last_lines(path: Path, most: int = 1 << 16) -> list[dict[str, Any]]:
    """Return the lines at the end of a .jsonl, of at most so many bytes: what a run said last, however long it is."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - most))
            content = file.read()
    except OSError:
        return []
    return [line for line in lines_of(content) if line is not None]  # the first may be cut: then it is no JSON


def parsed_lines(path: Path) -> list[dict[str, Any] | None]:
    """Return the lines of a .jsonl, None for one that is damaged."""
    return lines_of(path.read_bytes() if path.is_file() else b"")


def lines_of(content: bytes) -> list[dict[str, Any] | None]:
    """Return the lines of a .jsonl's content, None for one that is damaged."""
    found: list[dict[str, Any] | None] = []
    for raw in content.split(b"\n"):
        if raw.strip():
            value = None
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(raw.decode("utf-8"))
            found.append(value if isinstance(value, dict) else None)
    return found


def append_line(path: Path, value: Any) -> None:
    """Add a line to a .jsonl in one piece; what a killed process left of one stays a line by itself."""
    line = json.dumps(value).encode() + b"\n"
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()  # asked once: for an instant it changes the whole process's


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep_temporaries(folder: Path) -> None:
    """Remove what killed processes left half written, and nothing that a living one is writing."""
    for leftover in folder.glob(f".*{TEMPORARY}"):
        with contextlib.suppress(OSError):
            if leftover.is_dir() and not (leftover / WRITER).exists():
                leftover.rmdir()  # only if empty: killed, or about to lock it
                continue
            with open(leftover / WRITER if leftover.is_dir() else leftover, "rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(folder: Path, what: str, *, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold `folder` for this process; the kernel lets go of it when the process ends, however it ends.

    Where another process holds it: UserError naming that process, or, with `wait`, patience (`wait` is told the
    holder once).
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        told, patience = False, time.monotonic() + 0.5  # `holder_of` in another process takes the lock for an instant
        while not try_lock(file):
            holder = _holder(file)
            if wait is None and time.monotonic() < patience:
                time.sleep(0.05)
                continue
            if wait is None:
                raise LockedError(f"{what} is being worked on by {holder}", hint="`msd status RUN` shows who does what")
            if not told:
                wait(f"waiting for {what}: {holder} is at work on it")
                told = True
            time.sleep(0.2)
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        sweep_temporaries(folder)
        yield


def holder_of(folder: Path) -> str | None:
    """Return who holds the lock of `folder`, as a phrase, or None."""
    try:
        with open(folder / ".lock", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
    except FileNotFoundError:
        return None
    except OSError:
        with open(folder / ".lock", encoding="utf-8") as file:
            return _holder(file)


def try_lock(file: IO[str]) -> bool:
    """Lock an open file for this process, where nobody else does."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(file: IO[str]) -> str:
    try:
        file.seek(0)
        who = json.loads(file.read())
        return f"process {who['pid']} on {who['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


PARTS = ("autoencoder", "text")  # folders that a teacher may hold beside its network


def link(source: Path, target: Path) -> None:
    """Give `target` the finished files of `source` and of its folders: hard links where the file system has them, else
    copies.
    """
    target.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        if (source / part).is_dir():
            link(source / part, target / part)
    for file in sorted(source.iterdir(), key=lambda f: f.name == "model.json"):  # the sign of completeness comes last
        if file.name.startswith((".", "state.")) or file.name == "state":  # checkpoints
            continue
        if file.is_dir():
            link(file, target / file.name)
        if not file.is_file():
            continue
        place = target / file.name
        if place.exists() and (place.samefile(file) or filecmp.cmp(place, file, shallow=False)):
            continue
        try:
            os.link(file.resolve(), place)  # a link's file: the link itself may mean nothing elsewhere
        except OSError:
            with writing(place) as temporary:
                shutil.copyfile(file, temporary)
