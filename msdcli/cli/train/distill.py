"""`msd distill`: everything from a recipe to measured students."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from msdcli import console
from msdcli.cli import options
from msdcli.errors import UserError

if TYPE_CHECKING:
    from msdcli.engine.distributed.group import ProcessGroup
    from msdcli.engine.results import DistillResult
    from msdcli.engine.tracking.events import Progress as Event
    from msdcli.recipe import Recipe

TOTAL_EVERY = 30.0  # seconds between two looks at the whole run


def register(app: typer.Typer) -> None:
    app.command("distill")(distill)


def distill(
    recipe: options.Recipe,
    overrides: options.Overrides = None,
    student: Annotated[
        int | None, typer.Option(min=0, help="Train this student only: one Slurm array task or GPU.")
    ] = None,
    students_per_device: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Train this many students at once on each device, a process each."),
    ] = None,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="The teacher alone: train it, draw samples, measure it, and stop.")
    ] = False,
    json_: options.Json = False,
    dry_run: options.DryRun = False,
    show_recipe: Annotated[
        bool, typer.Option("--recipe", help="With --dry-run: print the complete recipe, too.")
    ] = False,
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
    ahead: Annotated[bool, typer.Option("--ahead", hidden=True)] = False,
) -> None:
    """Train teacher and students, sample and measure: whatever of it is not done yet.

    Run the same command again to resume, also while other processes or hosts work on the same run.
    """
    from msdcli.engine.distributed import launcher

    if ahead:
        _ahead(recipe)
        return
    torchrun = launcher.num_processes() > 1
    if show_recipe and not dry_run:
        raise UserError("--recipe goes with --dry-run", hint=f"msd recipes show {recipe}")
    if students_per_device is not None:
        _check_alone(overrides, {"--student": student is not None, "--worker": worker, "torchrun": torchrun})
    if teacher:
        if student is not None or worker or torchrun or students_per_device is not None:
            raise UserError("--teacher is about no student, and one process trains it", hint="leave out the others")
        if not dry_run:
            _teach(recipe, overrides, json_)
            return
    if torchrun and not dry_run:
        launcher.share()  # before torch is loaded: does it say all?
        from msdcli.engine.distributed import group as distributed

        with distributed.join_torchrun() as group:
            _distill(recipe, overrides, student, json_, worker=False, group=group)
        return
    planned = _Planned(show_recipe) if dry_run else None
    _distill(recipe, overrides, student, json_, worker=worker, planned=planned, per_device=students_per_device)


def _ahead(run: str) -> None:
    """Make what the run is measured by, for the process that trains its teacher and has started this one."""
    from msdcli.engine.distributed.workers import die_with_parent, to_parent
    from msdcli.engine.measure import ahead
    from msdcli.recipe import load
    from msdcli.rundir import RunDir

    die_with_parent()
    ahead.of_data(RunDir(load(run).run_dir), to_parent())


@dataclass(frozen=True)
class _Planned:
    """Nothing is done but planned; with the complete recipe or without."""

    recipe: bool


def _check_alone(overrides: list[str] | None, others: dict[str, bool]) -> None:
    """Raise UserError where something else says, too, which students this process trains."""
    others["workers=..."] = any(override.partition("=")[0].strip() == "workers" for override in overrides or [])
    for name, given in others.items():
        if given:
            raise UserError(
                f"--students-per-device and {name} do not go together: each says who trains which students",
                hint=f"leave out one of the two{'; start it without torchrun' if name == 'torchrun' else ''}",
            )


def _distill(
    recipe: str,
    overrides: list[str] | None,
    student: int | None,
    json_: bool,
    *,
    worker: bool,
    planned: _Planned | None = None,
    per_device: int | None = None,
    group: ProcessGroup | None = None,
) -> None:
    from msdcli.recipe import load

    loaded = load(recipe, overrides)
    if per_device is not None:
        from msdcli.engine.distributed.device import with_students_per_device

        loaded = with_students_per_device(loaded, per_device)
    if planned is not None:
        _plan(loaded, json_, with_recipe=planned.recipe)
        return
    if worker:
        from msdcli.engine import pipeline
        from msdcli.engine.distributed.workers import die_with_parent, to_parent

        die_with_parent()
        pipeline.distill(loaded, to_parent(), worker=True)
        return
    leads = group is None or group.is_leader
    with console.Monitor(quiet=json_ or not leads) as monitor:
        monitor(f"{loaded.run_dir}: checking recipe, data and networks")  # before torch is loaded, which takes seconds
        from msdcli.engine import pipeline
        from msdcli.engine.distributed.group import SINGLE_PROCESS

        report = _WithTotal(monitor, loaded) if group is None and not json_ else monitor
        outcome = pipeline.distill(loaded, report, student=student, group=group or SINGLE_PROCESS)
    if leads:
        _show(outcome, json_)


class _WithTotal:
    """Passes reports on, and says now and then how long the whole run has left, as `msd watch` and `msd status` do."""

    def __init__(self, monitor: console.Monitor, recipe: Recipe) -> None:
        from msdcli.engine.report.live import ProgressTracker
        from msdcli.rundir import RunDir

        self.monitor, self.recipe = monitor, recipe
        self._tracker = ProgressTracker(RunDir(recipe.run_dir))
        self._next, self._counted = time.monotonic() + TOTAL_EVERY, False

    def __call__(self, event: Event | str) -> None:
        self.monitor(event)
        if isinstance(event, str) or event.unit != "steps" or time.monotonic() < self._next:
            return
        from msdcli.engine.plan import note_flops

        run = self._tracker.run
        if not run.recipe_file.is_file():
            return
        if not self._counted:  # what is there may be of fewer steps; not for short runs: it takes a second or two
            note_flops(self.recipe)
            self._counted = True
        if (left := self._tracker.progress().seconds_left) is not None:
            self.monitor.total(left)
        self._next = time.monotonic() + TOTAL_EVERY


def _teach(recipe: str, overrides: list[str] | None, json_: bool) -> None:
    from msdcli.cli.results.fid import show
    from msdcli.recipe import load

    loaded = load(recipe, overrides)
    with console.Monitor(quiet=json_) as monitor:
        monitor(f"{loaded.run_dir}: checking recipe, data and networks")
        from msdcli.engine import pipeline

        taught = pipeline.teach(loaded, monitor)
    if json_:
        console.print_json({"run": str(taught.run.root)} | taught.measurement.to_json())
        return
    show(taught.measurement, brief=True)
    console.say_prose(taught.verdict.said)
    console.say(f"samples: {taught.grid}")
    again = shlex.join([recipe, *(overrides or [])])
    console.say(f"run:     {taught.run.root}  (next: msd distill {again}, which goes on with the students)")


def _plan(recipe: Recipe, json_: bool, *, with_recipe: bool) -> None:
    from msdcli.engine.plan import plan

    planned = plan(recipe)
    if json_:
        console.print_json(planned.to_json())
        return
    for line in planned.lines():
        console.say(line)
    if with_recipe:
        from msdcli.recipe.applies import readable

        sys.stdout.write(readable(recipe))
    else:
        console.tell("every key: the same command with --recipe, or msd recipes show")


def _show(outcome: DistillResult, json_: bool) -> None:
    from msdcli.cli.results.fid import cost_table, show
    from msdcli.engine.tracking.accounting import costs

    if json_:
        result = outcome.measurement.to_json() if outcome.measurement else None
        console.print_json(
            {
                "run": str(outcome.run.root),
                "unfinished": outcome.unfinished,
                "measurement": result,
                "cost": costs(outcome.run),
            }
        )
        return
    cost_table(costs(outcome.run))
    if outcome.grid is None:
        left = (
            f"students still to do: {', '.join(map(str, outcome.unfinished))}"
            if outcome.unfinished
            else "all students are done"
        )
        console.say(f"{outcome.run.root}: {left}; `msd distill {outcome.run.root}` finishes and measures the run")
        return
    if outcome.measurement is not None:
        from msdcli.engine.report.words import closing

        show(outcome.measurement, brief=True)  # with the warnings
        for sentence in closing(outcome.run):
            console.say_prose(sentence)
    console.say(f"samples: {outcome.grid}")
    how = '--prompt "a red fox"' if outcome.run.recipe().has_prompts else "--all"
    console.say(
        f"run:     {outcome.run.root}  (next: msd report {outcome.run.root}, or msd sample {outcome.run.root} {how})"
    )
    if outcome.measurement is None:
        console.say(
            f"no distance: there are no real images. msd fid {outcome.run.root} PICTURES --protocol clean measures "
            "against a folder of them, or published statistics"
        )
