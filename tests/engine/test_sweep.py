"""Sweeps: cells are ordinary runs, machines share them, tables carry the spread."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from msdcli import sweep
from msdcli.engine import sweep as engine
from msdcli.errors import UserError
from msdcli.recipe import Recipe, load
from tests.conftest import Msd

SWEEP = """
recipe: tiny.yaml
base: {stages.0.steps: 3}
seeds: [0, 1]
rows:
  - {label: "K = 1", set: {partition.students: 1}}
  - {label: "K = 2, cd", set: {stages: [{objective: cd, steps: 3, batch: 16}]}}
"""


@pytest.mark.parametrize("path", sweep.shipped(), ids=lambda p: p.stem)
def test_shipped_sweeps_are_good(path: Path) -> None:
    loaded = sweep.load(path)
    assert len(loaded.cells) >= 6 or loaded.settings.frontier is not None
    assert all(f"# {key}:" in path.read_text() for key in ("Shows", "Costs", "Measured"))


def test_two_workers_finish_one_sweep_and_the_table_sums_it_up(msd: Msd, tiny: Path) -> None:
    (tiny.parent / "mini.yaml").write_text(SWEEP)
    first = msd("sweep", "mini.yaml", "--worker", "0/2")
    assert first.returncode == 0, first.stderr
    second = msd("sweep", "mini.yaml", "--worker", "1/2", "--json")
    assert second.returncode == 0, second.stderr
    lines = {line["label"]: line for line in json.loads(second.stdout)["lines"]}
    assert list(lines) == ["teacher", "K = 1", "K = 2, cd"]
    assert lines["K = 1"]["seeds"] == [0, 1]
    assert len(set(lines["K = 1"]["figures"]["sliced_wasserstein"])) == 2
    folder = tiny.parent / "runs/mini"
    assert len(list((folder / ".shared").glob("teacher-*"))) == 1, "cells share the teacher"
    with open(folder / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["line"] for r in rows] == ["teacher", "K = 1", "K = 1", "K = 2, cd", "K = 2, cd"]
    assert "±" in (folder / "table.md").read_text()
    assert (folder / "table.png").read_bytes().startswith(b"\x89PNG")
    assert msd("status", "runs/mini/k-1-seed0").returncode == 0, "a cell is an ordinary run"


def test_a_line_may_take_the_run_of_an_earlier_one(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"label": "K = 1", "set": {"partition.students": 1}},
        {
            "label": "K = 2, difficulty",
            "set": {"partition": {"method": "difficulty", "students": 2}},
            "runs": {"partition.run": "K = 1"},
        },
    ]
    file = tiny.parent / "chained.yaml"
    file.write_text(json.dumps({"recipe": "tiny.yaml", "seeds": [0, 1], "rows": rows}))
    loaded = sweep.load(file)
    assert [cell.recipe.partition.run for cell in loaded.cells[2:]] == [
        "runs/chained/k-1-seed0",
        "runs/chained/k-1-seed1",
    ]
    made: list[str] = []
    monkeypatch.setattr(engine.pipeline, "distill", lambda recipe, _: made.append(recipe.name))
    engine.run(loaded, lambda _: None, worker=(3, 4))
    assert made == ["k-1-seed1", "k-2-difficulty-seed1"], "a worker finishes what its runs need"
    file.write_text(json.dumps({"recipe": "tiny.yaml", "rows": rows[::-1]}))
    with pytest.raises(UserError, match="K = 2, difficulty: runs names 'K = 1', and no line before it"):
        sweep.load(file)


def test_a_result_is_the_runs_own_and_of_the_recipe_as_it_is(finished: Path, tmp_path: Path) -> None:
    """A run may be given more steps or other samples: then what was measured before is no result of it."""
    shutil.copytree(finished.parent, tmp_path / "runs")
    root = tmp_path / "runs/tiny"
    recipe = load(root / "recipe.yaml", [f"run={root}"])

    def found(**changed: Any) -> dict[str, Any] | None:
        dump = recipe.model_dump(mode="json")
        for name, value in changed.items():
            section, _, key = name.partition("__")
            (dump["stages"][-1] if section == "last" else dump[section])[key] = value
        return engine.result_of(sweep.Cell("a", 0, Recipe.model_validate(dump)))

    own = found()
    assert own is not None and own["metric"] == "l1_toy2d"
    (root / "metrics/fd_clip.json").write_text(json.dumps(own | {"metric": "sliced_wasserstein"}))
    assert found() == own, "not the first by alphabet"
    (root / "metrics/fd_clip.json").write_text(json.dumps(own | {"students_sha256": []}))
    assert found() == own, "not the first of other students"
    assert found(last__steps=recipe.stages[-1].steps + 1) is None
    assert found(evaluation__samples=recipe.evaluation.samples + 1) is None
    assert found(evaluation__seed=7) is None
    other = own | {"students_sha256": [*own["students_sha256"][:-1], "0" * 64]}
    (root / "metrics/l1_toy2d.json").write_text(json.dumps(other))
    assert found() is None, "of other students"


def test_teachers_have_a_line_for_every_solver(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(cell: sweep.Cell) -> dict[str, Any]:
        solver = cell.recipe.teacher.solver
        values = {"l1": solver.evaluations + 0.1 * cell.seed}
        rows = [{"who": who, "group": "whole", "values": values} for who in ("teacher", "students")]
        return {"metric": "l1", "samples": 9, "rows": rows, "teacher_sha256": str(cell.recipe.teacher.seed)}

    monkeypatch.setattr(engine, "result_of", found)
    monkeypatch.setattr(engine, "_cost", lambda run: {})
    text = SWEEP.replace("seeds: [0, 1]", "seeds: [0, 1]\nseed_keys: [seed, teacher.seed]")
    other = text.replace("set: {stages", "set: {teacher.solver.name: deis, stages")
    for content, wanted in (
        (text, {"teacher": [7, 7.1]}),
        (other, {"teacher, heun 7": [7, 7.1], "teacher, deis 4": [4, 4.1]}),
    ):
        (tiny.parent / "mini.yaml").write_text(content)
        table = engine.lines(sweep.load(tiny.parent / "mini.yaml"))
        assert {line.label: line.figures["l1"] for line in table if line.is_teacher} == wanted
        assert [line.label for line in table] == [*wanted, "K = 1", "K = 2, cd"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SWEEP.replace("rows", "row"), "did you mean `rows`"),
        (SWEEP.replace("partition.students: 1", "partition.student: 1"), "K = 1: partition.student"),
        (SWEEP.replace("K = 2, cd", "K: 1"), "the same label"),
        (SWEEP.replace("tiny.yaml", "tinny"), "no recipe at tinny"),
    ],
)
def test_mistakes_in_a_sweep_are_named(tiny: Path, text: str, said: str) -> None:
    path = tiny.parent / "mini.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        sweep.load(path)


def test_a_grid_is_every_combination(tiny: Path) -> None:
    path = tiny.parent / "mini.yaml"
    path.write_text("recipe: tiny.yaml\nseeds: [0]\ngrid: {partition.students: [1, 2], stages.0.batch: [8, 16]}\n")
    loaded = sweep.load(path)
    assert loaded.labels == [f"students {k}, batch {b}" for k in (1, 2) for b in (8, 16)]
    assert {(c.recipe.partition.students, c.recipe.stages[0].batch) for c in loaded.cells} == {
        (1, 8),
        (1, 16),
        (2, 8),
        (2, 16),
    }


def test_bad_shares_are_refused(msd: Msd, tiny: Path) -> None:
    (tiny.parent / "mini.yaml").write_text(SWEEP)
    assert msd("sweep", "mini.yaml", "--worker", "2/2").returncode == 2


def test_a_grid_without_end_is_refused_at_once(tmp_path: Path) -> None:
    from msdcli.errors import UserError
    from msdcli.sweep import load

    keys = "".join(f"  k{i}: [{', '.join(map(str, range(10)))}]\n" for i in range(20))
    (tmp_path / "s.yaml").write_text(f"recipe: digits\ngrid:\n{keys}")
    with pytest.raises(UserError, match="a sweep has at most 1,000"):
        load(tmp_path / "s.yaml")


def test_a_line_has_the_figures_that_all_of_its_runs_have() -> None:
    """One of them may have been measured with more (`--infinity`), or with less (`--lean`)."""
    assert engine.common([{"fd": 1.0, "fd_infinity": 0.9, "kid": 0.1}, {"fd": 2.0}]) == {"fd": [1.0, 2.0]}
