"""What a report tells about one run: everything the run directory holds, read once; no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msdcli import records
from msdcli.engine.inputs import prompts
from msdcli.engine.report.status import status
from msdcli.engine.tracking.accounting import costs
from msdcli.engine.tracking.history import TrainingHistory, history
from msdcli.errors import UserError
from msdcli.foreign import visible
from msdcli.partition import Partition
from msdcli.recipe import Recipe
from msdcli.rundir import RunDir


@dataclass(frozen=True)
class RunFacts:
    """One run, as far as it has come."""

    label: str
    run: RunDir
    recipe: Recipe
    state: dict[str, Any]
    record: dict[str, Any]  # run.json
    class_names: list[str]
    partition: Partition | None
    teacher: dict[str, Any]  # model.json; empty while there is none
    students: list[list[dict[str, Any]]]  # per student, the model.json of every finished stage
    trainings: list[TrainingHistory]
    results: list[dict[str, Any]]  # the measurements
    watched: list[dict[str, Any]]  # those under way
    costs: list[dict[str, Any]]
    missing: list[str]

    @property
    def evaluations(self) -> int:
        """Network evaluations of the teacher for one image."""
        return self.recipe.teacher.solver.evaluations

    @property
    def steps(self) -> int:
        """Network evaluations of a student for one image."""
        return self.recipe.stages[-1].evaluations

    @property
    def condition(self) -> str:
        """What students divide among them, in the singular."""
        return "prompt" if self.recipe.has_prompts else "class"

    @property
    def conditions(self) -> str:
        return "prompts" if self.recipe.has_prompts else "classes"

    @property
    def measuring(self) -> str:
        """The command that measures a run whose own data cannot."""
        return f"msd fid {self.run.root} PICTURES --protocol clean"

    @property
    def planar(self) -> bool:
        return len(self.record.get("shape", [0, 0, 0])) == 1


def load_runs(roots: Sequence[Path]) -> list[RunFacts]:
    """Read runs. UserError where one is no run directory or is named twice."""
    resolved = [root.resolve() for root in roots]
    if twice := [str(root) for root, path in zip(roots, resolved, strict=True) if resolved.count(path) > 1]:
        raise UserError(f"{twice[0]} is named twice")
    names = [path.name for path in resolved]
    labels = [visible(name if names.count(name) == 1 else str(root)) for root, name in zip(roots, names, strict=True)]
    return [_read(RunDir(root), label) for root, label in zip(roots, labels, strict=True)]


def _names(run: RunDir, record: dict[str, Any], count: int) -> list[str]:
    """The names of the conditions: of classes, or the prompts themselves."""
    if (run.prompts / prompts.RECORD).is_file():
        return prompts.read_prompts(run.prompts)
    names = [str(name) for name in record.get("class_names", range(count))]
    if len(names) < count:
        raise UserError(f"{run.record_file} names {len(names)} classes, partition.json divides {count}")
    return [visible(name) for name in names]


def _read(run: RunDir, label: str) -> RunFacts:
    recipe, missing = run.recipe(), list[str]()
    state = status(run)
    record = _optional(run.record_file, "run.json: versions, commands and class names", missing, records.run)
    partition = Partition.load(run.partition) if run.partition.is_file() else None
    count = partition.num_conditions if partition else len(record.get("class_names", []))
    students = [_models(run, recipe, k) for k in range(recipe.partition.students)]
    facts = RunFacts(
        label=label,
        run=run,
        recipe=recipe,
        state=state,
        record=record,
        class_names=_names(run, record, count),
        partition=partition,
        teacher=_optional(run.teacher / "model.json", "the teacher is not finished", missing, records.model),
        students=students,
        trainings=history(run),
        results=[records.measurement(path) for path in run.results()],
        watched=records.watched(run.watched),
        costs=costs(run),
        missing=missing,
    )
    missing += _unfinished(facts)
    return facts


def _optional(path: Path, what: str, missing: list[str], read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    if not path.is_file():
        missing.append(what)
        return {}
    return read(path)


def _models(run: RunDir, recipe: Recipe, student: int) -> list[dict[str, Any]]:
    folders = [run.stage(student, i, stage.objective) for i, stage in enumerate(recipe.stages)]
    return [records.trained(folder / "model.json") for folder in folders if (folder / "model.json").is_file()]


def _unfinished(facts: RunFacts) -> list[str]:
    found = [f"the {facts.conditions} are not divided yet"] if facts.partition is None else []
    for student in facts.state["students"]:
        stage = next((s for s in student["stages"] if s["state"] != "done"), None)
        if stage is not None:
            holder = f", {student['running']} is at it" if student["running"] else ""
            where = f"at step {stage['step']:,} of {stage['steps']:,}" if stage["step"] else "not begun"
            found.append(f"student {student['student']} is not finished: {stage['objective']} {where}{holder}")
    if not facts.results and facts.recipe.has_measure:
        found.append("no measurement yet: msd distill makes one when all students are finished, msd fid any other")
    elif not facts.results:
        found.append(f"no measurement: there are no real images; {facts.measuring} makes one")
    if not any(training.lines for training in facts.trainings):
        found.append("no losses were kept (metrics.jsonl)")
    return found


# One measurement.

LOWER = ("fd_", "fid", "l1_", "kid", "sliced_wasserstein")


def lower_is_better(metric: str) -> bool:
    """Whether less of a figure is better: distances, not shares."""
    return metric.startswith(LOWER)


def row(result: dict[str, Any], who: str, group: str = "whole") -> dict[str, Any] | None:
    """Return one line of a measurement."""
    return next((r for r in result["rows"] if (r["who"], r["group"]) == (who, group)), None)


def metrics(result: dict[str, Any]) -> list[str]:
    """Return the names of all figures of a measurement, the distance first."""
    return list(dict.fromkeys([result["metric"], *(name for r in result["rows"] for name in r["values"])]))


def main_result(facts: RunFacts) -> dict[str, Any] | None:
    """Return the measurement that the run itself ends with, or else the first."""
    own = [r for r in facts.results if r["metric"] in facts.recipe.own_metrics]
    return next(iter(own or facts.results), None)


def group_name(group: str, class_names: Sequence[str]) -> str:
    """Return `class 3 (cat)` for `class 3`; other groups keep their names."""
    word, _, number = group.partition(" ")
    if word != "class" or not number.isdecimal() or int(number) >= len(class_names):
        return group
    name = class_names[int(number)]
    return group if name == number else f"class {number} ({name})"
