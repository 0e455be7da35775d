"""A teacher is judged before students start, can be had alone, and a run that made nothing keeps no name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from msdcli.engine import pipeline
from msdcli.engine.measure import teacher
from msdcli.engine.measure.rows import Row
from msdcli.engine.tracking.events import silent
from msdcli.errors import STOPPED, USER, UserError, explain
from msdcli.metrics.frechet import frechet_distance
from msdcli.metrics.moments import ClassMoments, Gaussian
from msdcli.recipe import load
from msdcli.rundir import RunDir, write_json
from tests.conftest import Msd


def test_one_average_picture_is_at_the_variance_of_the_features() -> None:
    """What a teacher's distance is compared with: ||m - m||^2 + tr(Sigma)."""
    features = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 6)
    moments = ClassMoments(5)
    moments.add(features, np.zeros(200, np.int64))
    real = moments.whole().gaussian()
    same = Gaussian(real.mean, np.zeros((5, 5)), 200)
    assert frechet_distance(same, real) == pytest.approx(teacher._spread(real), rel=1e-6)


def rows(distance: float, accuracy: float, samples: int = 1000) -> list[Row]:
    return [
        Row("real halves", "whole", 500, 500, {"fd_x": 0.5, "accuracy": 0.9}),
        Row("teacher", "whole", samples, 1000, {"fd_x": distance, "accuracy": accuracy}),
    ]


@pytest.mark.parametrize(
    ("distance", "accuracy", "state"),
    [(1, 0.88, "fit"), (1, 0.7, "weak"), (1, 0.15, "unfit"), (15, 0.88, "weak"), (51, 0.88, "unfit")],
)
def test_a_teacher_is_judged_by_distance_and_by_accuracy(distance: float, accuracy: float, state: str) -> None:
    found = teacher.verdict("fd_x", rows(distance, accuracy), 100, guess=0.1)
    assert found.state == state and "two halves of the data: 0.500" in found.said
    assert f"{accuracy:.0%} of its samples are recognised" in found.said


def test_nothing_is_stopped_for_what_is_not_sure() -> None:
    assert teacher.verdict("fd_x", rows(51, 0.15, samples=100), 100, guess=0.1).state == "weak"
    assert teacher.verdict("fd_x", rows(51, 0.15), 100, guess=None).state == "weak", "a classifier that knows nothing"
    points = [Row("teacher", "whole", 1000, 1000, {"l1_x": 1.5, "sliced_wasserstein": 3.0})]
    assert teacher.verdict("l1_x", points, 10, guess=None).state == "unfit"
    assert teacher.verdict("l1_x", points, 100, guess=None).state == "fit"


@pytest.mark.parametrize(
    ("changes", "samples"),
    [([], 2048), (["pairs.count=1999"], 5000), (["evaluation.samples=300"], 300), (["stages.0.pairs=none"], 5000)],
)
def test_pairs_that_students_need_are_enough_to_judge_by(changes: list[str], samples: int) -> None:
    assert teacher.enough(load("digits-dm", changes)) == samples


def test_a_teacher_alone(msd: Msd, tiny: Path) -> None:
    done = msd("distill", "tiny.yaml", "--teacher")
    assert done.returncode == 0, done.stderr
    assert "The teacher is" in done.stdout and "msd distill tiny.yaml" in done.stdout
    run = RunDir(Path("runs/tiny"))
    assert (run.samples / "teacher.png").is_file() and not run.begun() and not run.results()
    stored = json.loads((run.metrics / "teacher" / "l1_toy2d.json").read_text())
    assert stored["value"] == stored["teacher"] and stored["verdict"]["state"] in ("fit", "weak", "unfit")
    found = json.loads(msd("distill", "tiny.yaml", "--teacher", "--json").stdout)
    assert found["value"] == stored["value"], "measured again, the same"
    # Another recipe takes the name: the teacher is no reason to keep it.
    before = load("runs/tiny")
    assert msd("distill", "tiny.yaml", "--teacher", "teacher.training.steps=8").returncode == 0
    assert (before.teacher.training.steps, load("runs/tiny").teacher.training.steps) == (12, 8)
    assert msd("distill", "tiny.yaml", "--teacher", "--student", "0").returncode == 2


def test_an_unfit_teacher_stops_the_run_and_keeps_no_name(
    msd: Msd, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "SURE", 10)
    monkeypatch.setattr(teacher, "UNFIT_SPREAD", 0.0)
    done = msd("distill", "tiny.yaml", "evaluation.judge=stop")
    assert done.returncode == 2 and "not fit to be distilled" in done.stderr
    assert "evaluation.judge=tell" in done.stderr and Path("runs/tiny/samples/teacher.png").is_file()
    assert not list(Path("runs/tiny").glob("students/*/*/model.json"))
    done = msd("distill", "tiny.yaml", "evaluation.judge=tell", "stages.0.steps=4")
    assert done.returncode == 0 and "not fit to be distilled" in done.stderr
    assert RunDir(Path("runs/tiny")).begun()
    assert msd("distill", "tiny.yaml", "stages.0.lr=0.5").returncode == 2, "now there are students"


def test_a_given_teacher_is_judged_as_a_trained_one_and_its_advice_fits(
    msd: Msd, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert msd("distill", "tiny.yaml", "--teacher").returncode == 0
    monkeypatch.setattr(teacher, "SURE", 10)
    monkeypatch.setattr(teacher, "UNFIT_SPREAD", 0.0)
    given = ("distill", "tiny.yaml", "name=given", "teacher.path=runs/tiny/teacher", "evaluation.judge=stop")
    done = msd(*given)
    assert done.returncode == 2 and "not fit to be distilled" in done.stderr
    said = " ".join(done.stderr[done.stderr.index("try:") :].split())
    assert "training.steps" not in said and "classes those that it learnt" in said and "teacher.solver.steps=" in said
    done = msd("distill", "tiny.yaml", "name=given", "teacher.path=runs/tiny/teacher", "evaluation.judge=tell")
    assert done.returncode == 0 and "not fit to be distilled" in done.stderr
    assert json.loads(Path("runs/given/metrics/teacher/l1_toy2d.json").read_text())["verdict"]["state"] == "unfit"


def test_a_teacher_without_real_images_is_not_measured(msd: Msd, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert msd("distill", "tiny.yaml", "--teacher").returncode == 0
    monkeypatch.setattr(teacher, "measure", lambda *_, **__: pytest.fail("there is nothing to measure it by"))
    done = msd(
        "distill", "tiny.yaml", "name=given", "teacher.path=runs/tiny/teacher", "data={name: none}",
        "evaluation.judge=stop",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_run_whose_data_are_bad_leaves_no_directory(msd: Msd, tmp_path: Path) -> None:
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / "p" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((8 - 4 * i, 8 - 4 * i), 9, np.uint8)).save(tmp_path / "p" / name / f"{i}.png")
    (tmp_path / "my.yaml").write_text(
        "data: {name: folder, path: p, size: 8, channels: 1}\nstages: [{objective: dm, pairs: none}]\n"
    )
    assert msd("distill", "my.yaml").returncode == 2
    assert [f.name for f in (tmp_path / "runs").iterdir()] == [".shared"]


def test_who_works_on_a_run_keeps_it(tiny: Path, tmp_path: Path) -> None:
    import contextlib

    from msdcli.data import open_data
    from msdcli.engine.claim import Claim
    from msdcli.engine.tracking.events import silent

    recipe = load(tiny).model_copy(update={"run": str(tmp_path / "r")})
    other = recipe.model_copy(update={"seed": 5})
    run, data = RunDir(tmp_path / "r"), open_data(recipe.data)
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        Claim.begin(run, recipe, data, silent, first, student=None)
        with pytest.raises(UserError, match="being worked on"):
            Claim.begin(run, other, data, silent, second, student=None)
    found = [run.searched(), run.searched(1), run.partition, run.flops_file, run.metrics / "teacher" / "x.json"]
    for path in found:
        write_json(path, {})
    with contextlib.ExitStack() as stack:
        Claim.begin(run, other, data, silent, stack, student=None)
    assert run.recipe().seed == 5 and not any(path.exists() for path in found), "they were the first recipe's"


def test_a_teacher_is_judged_once(msd: Msd, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the tasks of an array: the others read what the first one found."""
    assert msd("distill", "tiny.yaml", "--teacher").returncode == 0
    monkeypatch.setattr(teacher, "measure", lambda *_, **__: pytest.fail("it was measured before"))
    done = msd("distill", "tiny.yaml", "--student", "0", "evaluation.judge=tell")
    assert done.returncode == 0 and "The teacher is" in done.stderr
    run = RunDir(Path("runs/tiny"))
    assert teacher.judged(run) is not None
    run.adopt(load("runs/tiny", ["evaluation.samples=100"]))
    assert teacher.judged(run) is None, "by other samples nobody has"


def test_who_is_done_while_others_train_ends_without_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    holders = {2: "process 7 on host"}
    monkeypatch.setattr(pipeline, "holder_of", lambda folder: holders.get(int(folder.name)))
    training: Any = SimpleNamespace(run=RunDir(tmp_path), unfinished=list)
    with pytest.raises(UserError) as ended:
        pipeline.finish(training, [2], silent)
    code, said, _ = explain(ended.value)
    assert code == STOPPED and "others go on with student 2 (process 7 on host)" in said
    with pytest.raises(UserError) as ended:
        pipeline.finish(training, [1, 2], silent)
    assert explain(ended.value)[0] == USER and "student 1 (nobody is at it)" in str(ended.value)
