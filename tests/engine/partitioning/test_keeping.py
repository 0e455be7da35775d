"""A run that gains a class, or a better student: the other students keep their weights bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msdcli import recipe as recipes
from msdcli.engine import estimate, pipeline, plan, sample, timing
from msdcli.engine.export.export import export
from msdcli.engine.export.format import ExportOptions
from msdcli.engine.measure import watch
from msdcli.engine.partitioning import making
from msdcli.engine.report import pictures, words
from msdcli.engine.report.facts import load_runs
from msdcli.engine.report.status import status
from msdcli.engine.tracking.accounting import costs
from msdcli.engine.tracking.events import silent
from msdcli.errors import UserError
from msdcli.partition import Partition
from msdcli.rundir import RunDir
from tests.conftest import Msd, train_classifier_briefly
from tests.data.test_folder import picture


def tree(folder: Path, classes: int, name: str, **partition: Any) -> dict[str, Any]:
    """A recipe of so many classes of small pictures, each with a teacher of its own."""
    file = folder / f"{classes}.npz"
    if not file.exists():
        count = 12 * classes
        np.savez(file, images=np.stack([picture(i) for i in range(count)]), labels=np.arange(count) % classes)
    return {
        "name": name,
        "run": str(folder / "runs" / name),
        "threads": 1,
        "workers": 1,
        "data": {"name": "folder", "path": str(file)},
        "teacher": {
            "network": {"kind": "unet", "channels": 8, "multipliers": [1], "blocks": 1, "embedding": 8},
            "training": {"steps": 2, "batch": 4},
            "solver": {"steps": 2},
        },
        "partition": partition,
        "stages": [{"objective": "tsm", "steps": 2, "batch": 4}, {"objective": "dm", "steps": 2, "batch": 4}],
        "evaluation": {"samples": 12, "judge": "off"},
    }


def distill(said: dict[str, Any], **overrides: Any) -> RunDir:
    return pipeline.distill(recipes.load_any(said, overrides), silent).run


@pytest.fixture(scope="module", autouse=True)
def _short_classifier() -> Iterator[None]:
    """What measures the runs learns for a moment only: no figure of it is looked at."""
    with pytest.MonkeyPatch.context() as patch:
        train_classifier_briefly(patch, 4)
        yield


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two students for two classes; the folder of data and runs."""
    folder = tmp_path_factory.mktemp("kept")
    distill(tree(folder, 2, "two", students=2))
    return folder


def hashes(run: RunDir) -> list[str]:
    found = [json.loads((f / "model.json").read_text())["sha256"] for f in sample.load(run.root).folders]
    return [str(sha256) for sha256 in found]


def test_a_new_class_trains_one_student_and_leaves_the_others(two: Path) -> None:
    before = RunDir(two / "runs/two")
    said = tree(two, 3, "three", method="extend", run=str(before.root), students=3)
    assert estimate.trained_students(recipes.load_any(said, {})) == [2]
    after = distill(said)
    assert hashes(after)[:2] == hashes(before)
    assert Partition.load(after.partition).parts == [[0], [1], [2]]
    old, new = sample.load(before.root), sample.load(after.root)
    assert torch.equal(old.sample([0, 1, 1, 0], seed=3), new.sample([0, 1, 1, 0], seed=3))
    with pytest.raises(UserError):
        old.sample([2])
    alone = distill(tree(two, 3, "alone", method="explicit", students=3, parts=[[0], [1], [2]]))
    assert hashes(after)[2] == hashes(alone)[2], "what is new is what a run of all three would have trained"
    assert status(after)["state"] == "done"
    spent = {row["part"]: row["flops"] for row in costs(after)}
    assert spent["student 0 dm"] == 0 == spent["student 1 tsm"] and spent["all students"] == sum(
        spent[f"student 2 {stage}"] for stage in ("tsm", "dm")
    )
    rows = json.loads(next(after.metrics.glob("fd_*.json")).read_text())["rows"]
    assert {"class 2", "student 2"} <= {row["group"] for row in rows if row["who"] == "students"}
    kept = json.loads((after.stage(0, 1, "dm") / "model.json").read_text())["kept"]
    assert kept == {"run": str(before.root), "sha256": hashes(before)[0]}
    given = export(after, two / "bundle", options=ExportOptions(bench=False))
    assert given["max_difference"] == 0, "the networks know two classes and three"
    said = "Kept as in the run two, and not trained in this one: students 0, 1."
    (facts,) = load_runs([after.root])
    assert said in (two / "bundle/README.md").read_text() and said in words.summary(facts)
    drawn = pictures.draw(facts, budget=10**6).galleries
    assert [len(of.stages) for of in drawn] == [2, 2, 4] and drawn[0].stages[0].what == "kept as in two"


def test_kept_students_may_be_of_another_size(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = RunDir(two / "runs/two")
    said = tree(two, 3, "wider", method="extend", run=str(before.root), students=3)
    said |= {"student": {"width": 0.5, "parts": [{}, {}, {"width": 2.0}]}}
    said["stages"][1]["sigmas"] = [1.5]
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    told = "\n".join(plan.plan(recipes.load_any(said, {})).lines())
    assert f"students 0 to 1: as in {before.root}" in told and "each of" not in told, told
    after = distill(said)
    assert hashes(after)[:2] == hashes(before)
    networks = [sample.load(after.root).student(k).net.settings.channels for k in range(3)]
    assert networks == [8, 8, 16], "what is kept is as it was, whatever the recipe says of new ones"
    recipe, seen = after.recipe(), list[float]()
    for k in range(3):
        snapshot = watch.newest(after, recipe, k)
        assert snapshot is not None
        seen += watch.load_snapshot(after, recipe, k, snapshot)[0].sigmas
    assert seen == [2.5, 2.5, 1.5], "reports draw it from its own noise level, too"
    assert export(after, two / "sizes", options=ExportOptions(bench=False))["max_difference"] == 0


@pytest.mark.slow
def test_networks_that_know_fewer_classes_are_exported_beside_others(two: Path) -> None:
    run = distill(tree(two, 3, "exported", method="extend", run=str(two / "runs/two"), students=3))
    for kind in ("torch", "onnx", "triton"):
        assert export(run, two / kind, kind, options=ExportOptions(bench=False))["max_difference"] < 1e-4


def test_the_run_goes_on_without_the_one_that_it_came_from(two: Path) -> None:
    moved = two / "runs/two-moved"
    said = tree(two, 3, "three-more", method="extend", run=str(moved), students=3)
    (two / "runs/two").rename(moved)
    try:
        run = distill(said)
    finally:
        moved.rename(two / "runs/two")
    before = hashes(run)
    said["stages"][1]["steps"] = 3  # more of the last stage: for the new student alone
    assert hashes(distill(said))[:2] == before[:2] and hashes(run)[2] != before[2]
    assert status(run)["state"] == "done"
    again = distill(tree(two, 3, "again", method="extend", run=str(run.root), students=3, retrain=[2], seed=0), seed=5)
    assert hashes(again)[:2] == before[:2] and hashes(again)[2] not in (before[2], hashes(run)[2])
    origin = json.loads((again.stage(0, 1, "dm") / "model.json").read_text())["kept"]["run"]
    assert origin == str(moved), "where it was trained, not where it was last"


@pytest.mark.parametrize(
    ("classes", "partition", "said"),
    [
        (3, {"students": 2}, "has 2 students, and 1 new classes need one of their own"),
        (3, {"students": 1}, "partition.students 1: .* has 2 students"),
        (3, {"students": 4}, "4 students for|2 students for 1 conditions|somebody would have none"),
        (2, {"students": 2}, "nothing is left to do"),
        (2, {"students": 3}, "3 students for 2 conditions"),
        (2, {"students": 2, "retrain": [2]}, "has no student 2"),
        (2, {"students": 2, "retrain": [0, 1]}, "nothing is kept"),
        (1, {"students": 1}, "students know classes by their number"),
    ],
)
def test_what_cannot_be_extended_is_refused(two: Path, classes: int, partition: dict[str, Any], said: str) -> None:
    asked = tree(two, classes, "refused", method="extend", run=str(two / "runs/two"), **partition)
    with pytest.raises(UserError, match=said):
        pipeline.check(recipes.load_any(asked, {}))
    assert not (two / "runs/refused").exists()


def test_a_damaged_or_unfinished_student_is_not_kept(two: Path, msd: Msd) -> None:
    asked = tree(two, 3, "damaged", method="extend", run=str(two / "runs/two"), students=3)
    with pytest.raises(UserError, match="evaluated 1 times for an image, those of the last stage here 2 times"):
        pipeline.check(recipes.load_any(asked, {"stages.1.sigmas": [2.5, 0.5]}))
    with pytest.raises(UserError, match="no run at"):
        pipeline.check(recipes.load_any(asked, {"partition.run": str(two / "nowhere")}))
    (two / "three.yaml").write_text(json.dumps(asked))
    shown = msd("partition", str(two / "three.yaml"))
    assert shown.returncode == 0 and "kept" in shown.stdout and "new" in shown.stdout, shown
    weights = RunDir(two / "runs/two").stage(1, 1, "dm") / "model.safetensors"
    good = weights.read_bytes()
    weights.unlink()  # a new file: students of other runs are links of this one
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    try:
        with pytest.raises(UserError, match="its hash differs"):
            distill(asked)
    finally:
        weights.unlink()
        weights.write_bytes(good)
    weights.with_name("model.json").rename(two / "away.json")
    with pytest.raises(UserError, match="student 1 is not finished"):
        making.check_parts(
            recipes.load_any(asked, {"run": str(two / "other")}), pipeline.dataset.look(recipes.load_any(asked, {}))
        )
    (two / "away.json").rename(weights.with_name("model.json"))
