"""frontier.json: everything that a frontier's table, pictures and advice are made of, read off its finished runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msdcli.diffusion.denoiser import Denoiser
from msdcli.engine.distributed import device
from msdcli.engine.estimate import share_of
from msdcli.engine.frontier import latency
from msdcli.engine.frontier.fitting import CellFactory
from msdcli.engine.frontier.floor import floor
from msdcli.engine.frontier.lines import Line, Wanted, alone_line, size_of
from msdcli.engine.frontier.measured import plan, unfinished
from msdcli.engine.inputs import teacher as teachers
from msdcli.engine.report import frontier
from msdcli.engine.report.frontier import RECORD
from msdcli.engine.report.plot import plot
from msdcli.engine.sweep import common, result_of, whole
from msdcli.engine.tracking.accounting import costs
from msdcli.engine.tracking.events import Report
from msdcli.engine.tracking.formatting import named_students
from msdcli.engine.train.counting import num_parameters
from msdcli.errors import UserError
from msdcli.outputs import check_file, check_table
from msdcli.recipe import Recipe
from msdcli.rundir import RunDir, key, read_json, write_json, write_text
from msdcli.sweep import Cell, Sweep

KEPT = ".measured"  # in the sweep's folder: what it took time to measure
TABLES, PICTURE = ("table.md", "table.csv"), "frontier.png"
BYTES = 4  # of a weight
OWN = ("workers", "threads", "evaluation.")  # keys of a sweep's base that make no student


def write(sweep: Sweep, report: Report) -> tuple[dict[str, Any], list[Path]]:
    """Read the finished runs, measure latencies and the metric's floor, and write frontier.json, table.md, table.csv
    and frontier.png into the sweep's folder; return the record and the paths. UserError where no run is finished.
    """
    check(sweep)
    factory = CellFactory(sweep)
    known = plan(factory)
    lines = [found for line in known.lines if (found := _line(factory, line))]
    if not lines:
        raise UserError(f"{sweep.folder}: no run of this sweep is finished", hint=f"msd sweep {sweep.name}")
    cell, result = _first(factory, known)
    run, recipe = RunDir(cell.recipe.run_dir), cell.recipe
    frozen, sha256 = teachers.load(run, recipe)
    left = {line.size: None for _, line, _ in unfinished(factory, known)}
    record = {
        "sweep": sweep.name,
        "data": recipe.data.model_dump(mode="json"),
        "metric": result["metric"],
        "samples": result["samples"],
        "students_against": result.get("students_against"),
        "versions": result.get("versions", {}),
        **_measured_here(sweep, factory, known, recipe, frozen),
        "floor": _kept(sweep, "floor", _floor_depends(result, recipe, sha256), lambda: floor(run, result, report)),
        "lines": lines,
        "open": [*left],
    }
    record["teacher"] |= {"distance": whole(result, "teacher")[result["metric"]]}
    return record, _written(sweep, record)


def _written(sweep: Sweep, record: dict[str, Any]) -> list[Path]:
    paths = [sweep.folder / name for name in (RECORD, *TABLES, PICTURE)]
    write_json(paths[0], record)
    write_text(paths[1], frontier.markdown(record))
    write_text(paths[2], frontier.as_csv(record))
    plot("frontier", [sweep.folder], paths[3])
    return paths


def check(sweep: Sweep) -> None:
    """Raise UserError where something else than an earlier frontier is in its place."""
    if (sweep.folder / RECORD).exists():
        frontier.load(sweep.folder)
    check_table(sweep.folder / TABLES[0], "| size |")
    check_table(sweep.folder / TABLES[1], "size,students")
    check_file(sweep.folder / PICTURE, ".png")


def _first(factory: CellFactory, known: Wanted) -> tuple[Cell, dict[str, Any]]:
    cells = (cell for line in known.lines for cell in factory.cells(line))
    return next((cell, found) for cell in cells if (found := result_of(cell)))


def _floor_depends(result: dict[str, Any], recipe: Recipe, teacher_sha256: str) -> list[Any]:
    """Return what a floor depends on: what is measured with, and what makes the teacher's samples."""
    measured = [result.get(name) for name in ("metric", "samples", "classifier_sha256", "reference_sha256", "versions")]
    return [*measured, teacher_sha256, recipe.teacher.solver.record(), recipe.pairs.seed]


def _line(factory: CellFactory, line: Line) -> dict[str, Any] | None:
    """Return what is known of a line; None while no seed of it is finished."""
    done = [(cell, result) for cell in factory.cells(line) if (result := result_of(cell))]
    if not done:
        return None
    known, keys = factory.costs(line), factory.keys(line)
    steps = [keys[f"stages.{i}.steps"] for i in range(len(known.step))]
    training = line.students * sum(c * n for c, n in zip(known.step, steps, strict=True))
    figures = [whole(result, "students") for _, result in done]
    return dataclasses.asdict(line) | {
        "budget": factory.budget(line),
        "flops": known.pairs + training,
        "memory": round(BYTES * line.students * known.parameters[1]),
        "steps": steps,
        "seconds": [_wall(cell.recipe, line) for cell, _ in done],
        "reduced_bytes": _reduced(known.gradient_bytes, steps, line.batch_factor),
        "seeds": [cell.seed for cell, _ in done],
        "distances": [values[result["metric"]] for values, (_, result) in zip(figures, done, strict=True)],
        "figures": common(figures),
        "keys": keys,
    }


def _wall(recipe: Recipe, line: Line) -> float:
    """Return the seconds that training took its devices: the slowest student's, or, of a batch that several would
    share and one device here took alone, the part of one of them, communication left out.
    """
    rows = costs(RunDir(recipe.run_dir))
    each = [
        sum(row["seconds"] for row in rows if row["part"].startswith(f"student {k} ")) for k in range(line.students)
    ]
    return float(max(each) / line.batch_factor)


def _reduced(gradient_bytes: list[int], steps: list[int], devices: int) -> float:
    """Return the bytes that each device sends in training: a ring's all-reduce sends 2 (n - 1) / n of the gradients."""
    return 2 * (devices - 1) / devices * sum(b * n for b, n in zip(gradient_bytes, steps, strict=True))


# What is measured for the record, and kept beside the runs.


def _measured_here(
    sweep: Sweep, factory: CellFactory, known: Wanted, recipe: Recipe, frozen: Denoiser
) -> dict[str, Any]:
    """Describe machine, teacher and sizes, each with its latency: of all evaluations that make an image."""
    on = device.prepare(recipe)
    recipes = {size.label: factory.cells(alone_line(size, 0))[0].recipe for size in factory.settings.sizes}
    networks = {
        _named(label, one, numbers): one.student.of(numbers[0]).network_for(frozen.settings)
        for label, one in recipes.items()
        for numbers in one.sizes
    }
    here = latency.machine(on)
    dumps = {label: network.model_dump(mode="json") for label, network in networks.items()}
    timed = _kept(
        sweep,
        "latency",
        [here, dumps, frozen.settings.model_dump(mode="json"), frozen.shape, frozen.num_classes],
        lambda: latency.measure({**networks, "": frozen.settings}, frozen, on),  # no size has an empty label
    )
    count = num_parameters(frozen)
    sizes = []
    for label, one in recipes.items():
        size = size_of(factory.settings, Line(label, 1, 1, 0))
        own, names = factory.costs(alone_line(size, 0)).parameters[1], [_named(label, one, n) for n in one.sizes]
        sizes.append(
            {
                "label": label,
                **({"network": dumps[label]} if label in dumps else {"networks": [dumps[name] for name in names]}),
                "parameters": round(own),
                "share": own / count,
                "evaluations": one.stages[-1].evaluations,
                "latency": _latency(one, [timed[name] for name in names]),
                "saturated": known.saturated.get(label),
                "recipe": size.recipe or sweep.settings.recipe,
                "set": {k: v for k, v in (sweep.settings.base | size.set).items() if not k.startswith(OWN)},
            }
        )
    teacher = {
        "network": frozen.settings.model_dump(mode="json"),
        "parameters": count,
        "latency": timed[""],
        "evaluations": recipe.teacher.solver.evaluations,
    }
    return {"machine": here, "teacher": teacher, "sizes": sizes}


def _named(label: str, recipe: Recipe, numbers: Sequence[int]) -> str:
    """What the network of some of a size's students is called: as the size, where all have it."""
    return label if recipe.student.parts is None else f"{label}, {named_students(numbers)}"


def _latency(recipe: Recipe, timed: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the seconds of all evaluations that make an image, on average over classes, and a request's at worst."""
    evaluations, shares = recipe.stages[-1].evaluations, [share_of(recipe, numbers) for numbers in recipe.sizes]
    found = {
        name: evaluations * sum(share * one[name] for share, one in zip(shares, timed, strict=True))
        for name in timed[0]
    }
    return found | {"worst": evaluations * max(one["request"] for one in timed)}


def _kept(sweep: Sweep, name: str, depends: Any, make: Any) -> Any:
    """Return what was measured before under the same circumstances, or measure it and keep it."""
    path = sweep.folder / KEPT / f"{name}-{key(name, depends)}.json"
    if not path.is_file():
        write_json(path, make())
    return read_json(path)
