"""TensorBoard and Weights & Biases: what metrics.jsonl says goes there as it is written, the results at the end.

The files of the run stay the record. A logger follows them, so nothing of it is in the training loop, and the process
that started workers logs for all of them.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from msdcli.engine.tracking.events import Progress, Report
from msdcli.engine.tracking.formatting import numbered
from msdcli.engine.tracking.history import METRICS, TrainingHistory, figures, history, teacher_folder
from msdcli.errors import UserError
from msdcli.recipe import Recipe
from msdcli.rundir import RunDir, key, lines_of, write_text


class Logger(Protocol):
    """Somewhere that figures and pictures go."""

    def knows(self, training: TrainingHistory) -> bool:
        """Whether an earlier process has logged some of this part."""

    def log(self, training: TrainingHistory, step: int, values: dict[str, float]) -> None: ...

    def results(self, values: dict[str, float], pictures: dict[str, Path], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/logs/tensorboard, a folder per student, so that students lie over each other in one chart."""

    def __init__(self, run: RunDir, recipe: Recipe) -> None:
        self.folder = run.logs / "tensorboard"
        self._before = {path.name for path in self.folder.glob("*")}
        self._writers: dict[str, Any] = {}

    def knows(self, training: TrainingHistory) -> bool:
        return _slug(training.who) in self._before

    def log(self, training: TrainingHistory, step: int, values: dict[str, float]) -> None:
        writer = self._writer(_slug(training.who))
        for name, value in values.items():
            writer.add_scalar(f"{training.stage.objective}/{name.replace('.', '/')}", value, step)
        writer.flush()

    def results(self, values: dict[str, float], pictures: dict[str, Path], step: int) -> None:
        import numpy as np
        from PIL import Image

        writer = self._writer("results")
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        for name, path in pictures.items():
            with Image.open(path) as picture:
                writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _writer(self, name: str) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        if name not in self._writers:
            self._writers[name] = SummaryWriter(str(self.folder / name))
        return self._writers[name]


class WandB:
    """One run of Weights & Biases per msd run, resumed by its name; offline unless WANDB_MODE says otherwise."""

    def __init__(self, run: RunDir, recipe: Recipe) -> None:
        import wandb

        name = run.logs / "wandb-id.txt"
        self._before = name.is_file()
        if not self._before:
            write_text(name, key("wandb", str(run.root.resolve()), os.urandom(8).hex()) + "\n")
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "msd"),
            name=recipe.name,
            id=name.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(run.logs),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=recipe.dump(),
        )
        self._known: set[str] = set()

    def knows(self, training: TrainingHistory) -> bool:
        return self._before

    def log(self, training: TrainingHistory, step: int, values: dict[str, float]) -> None:
        # Students train at once: each has an axis of its own instead of the run's one step counter.
        part = f"{_slug(training.who)}/{training.stage.objective}"
        if part not in self._known:
            self._known.add(part)
            self._run.define_metric(f"{part}/step")
            self._run.define_metric(f"{part}/*", step_metric=f"{part}/step")
        self._run.log({f"{part}/step": step} | {f"{part}/{name}": value for name, value in values.items()})

    def results(self, values: dict[str, float], pictures: dict[str, Path], step: int) -> None:
        self._run.log({name: self._wandb.Image(str(path)) for name, path in pictures.items()} | values)
        self._run.summary.update(values)

    def close(self) -> None:
        self._run.finish()


KINDS: dict[str, Callable[[RunDir, Recipe], Logger]] = {"tensorboard": TensorBoard, "wandb": WandB}


def check(names: Sequence[str]) -> None:
    """Raise UserError, before any work, where a logger's library is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"loggers: {name} is not installed", hint=f"pip install 'msdcli[{name}]', or leave it out: loggers=[]"
            )


def logged(distill: Callable[..., Any]) -> Callable[..., Any]:
    """Make `distill(recipe, report, ...)` tell the recipe's loggers what it trains and what comes of it."""

    @functools.wraps(distill)
    def wrapped(recipe: Recipe, report: Report, *, worker: bool = False, **options: Any) -> Any:
        check(recipe.loggers)
        group = options.get("group")
        if not recipe.loggers or worker or (group is not None and not group.is_leader):
            return distill(recipe, report, worker=worker, **options)
        with following(recipe, report) as follower:
            outcome = distill(recipe, follower, worker=worker, **options)
            if outcome.measurement is not None:
                follower.results(outcome.measurement.to_json(), outcome.grid)
        return outcome

    return wrapped


@contextmanager
def following(recipe: Recipe, report: Report) -> Iterator[Follower]:
    """Give a report that also logs; at the end, however it comes, all is written."""
    follower = Follower(recipe, report)
    try:
        yield follower
        follower.follow()
    finally:
        follower.close()


class Follower:
    """Passes reports on; a report about training makes it read the new lines of that part and log them.

    Only parts that this process reports are logged, since other processes on the run log theirs.
    """

    def __init__(self, recipe: Recipe, report: Report) -> None:
        self.recipe, self.report = recipe, report
        self.run = RunDir(recipe.run_dir)
        self._loggers: list[Logger] = []
        self._seen: dict[str, int] = {}  # bytes of each file that have been read
        self._last: dict[str, int] = {}  # step of each part that was logged last
        self._before = self._steps()
        self._mine: set[str] = set()

    def __call__(self, event: Progress | str) -> None:
        self.report(event)
        if isinstance(event, Progress) and event.unit == "steps":
            self._mine.add(event.what)
            self.follow()

    def follow(self) -> None:
        """Log every complete line that is new."""
        for training, path in self._parts():
            if _what(training) not in self._mine:
                continue
            for line in self._new_lines(path):
                step = int(line["step"])
                for logger in self._open():
                    after = self._before.get(_what(training), 0) if logger.knows(training) else 0
                    if step > max(after, self._last.get(_what(training), 0)):
                        logger.log(training, step, figures(line))
                self._last[_what(training)] = max(step, self._last.get(_what(training), 0))

    def results(self, result: dict[str, Any], grid: Path | None) -> None:
        """Log a measurement and the run's picture."""
        self.follow()
        values = {
            f"{row['who']}/{row['group']}/{name}".replace(" ", "-"): value
            for row in result["rows"]
            if numbered(row["group"])[0] != "class"
            for name, value in row["values"].items()
        }
        step = sum(stage.steps for stage in self.recipe.stages)
        for logger in self._open():
            logger.results(values, {} if grid is None else {"samples": grid}, step)

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()

    def _open(self) -> list[Logger]:
        """The loggers, opened when there is something to log: what ends at once leaves nothing behind."""
        if not self._loggers:
            self._loggers = [KINDS[name](self.run, self.recipe) for name in dict.fromkeys(self.recipe.loggers)]
        return self._loggers

    def _steps(self) -> dict[str, int]:
        if not self.run.recipe_file.is_file():
            return {}
        return {_what(t): t.lines[-1]["step"] for t in history(self.run) if t.lines}

    def _parts(self) -> Iterator[tuple[TrainingHistory, Path]]:
        yield TrainingHistory(None, 0, self.recipe.teacher.training), teacher_folder(self.run) / METRICS
        for k in range(self.recipe.partition.students):
            for i, stage in enumerate(self.recipe.stages):
                yield TrainingHistory(k, i, stage), self.run.stage(k, i, stage.objective) / METRICS

    def _new_lines(self, path: Path) -> Iterator[dict[str, Any]]:
        if not path.is_file():
            return
        begin = self._seen.get(str(path), 0)
        if path.stat().st_size < begin:
            begin = 0  # a resumed run dropped lines; those that were logged are known by their step
        with open(path, "rb") as file:
            file.seek(begin)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._seen[str(path)] = begin + len(whole) + len(newline)
        yield from (line for line in lines_of(whole) if line is not None and isinstance(line.get("step"), int))


def _what(training: TrainingHistory) -> str:
    """The name that reports of a part's training have."""
    return "teacher" if training.student is None else f"{training.who} {training.stage.objective}"


def _slug(text: str) -> str:
    return text.replace(" ", "-")
