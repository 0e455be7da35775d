"""Stages of the teacher: what each makes is shared and named by all that it depends on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from msdcli import records
from msdcli.data import open_data
from msdcli.engine.checkpoints.model import MODEL
from msdcli.engine.inputs import teacher, teacher_stages
from msdcli.engine.tracking.events import silent
from msdcli.recipe import load
from msdcli.rundir import RunDir
from tests.conftest import Msd

DDO = "{objective: ddo, steps: 4, batch: 16}"
TWO, ONE = f"teacher.stages=[{DDO}, {DDO}]", f"teacher.stages=[{DDO}]"


def test_a_teacher_goes_through_its_stages_before_it_teaches(tiny: Path, tmp_path: Path) -> None:
    data, hashes, runs = open_data(load(tiny).data), list[str](), list[RunDir]()
    for name, words, reused in (("plain", [], 0), ("one", [ONE], 0), ("two", [TWO], 1), ("two", [TWO], 2)):
        said: list[str] = []
        run, recipe = RunDir(tmp_path / "runs" / name), load(tiny, [*words, "pairs.count=16"])
        _, sha256 = teacher.provide(
            run, recipe, data, torch.device("cpu"), lambda event, said=said: said.append(str(event))
        )
        assert sum("teacher ddo: reused" in line for line in said) == reused
        hashes.append(sha256)
        runs.append(run)
    assert len(set(hashes)) == 3
    stages = load(tiny, [TWO]).teacher.stages
    for run, count in zip(runs, (0, 1, 2), strict=False):
        done = [teacher_stages.has_been_through(run.teacher, stages[:asked]) for asked in (0, 1, 2)]
        assert done == [asked == count for asked in (0, 1, 2)]


def test_the_plan_counts_them(tiny: Path, msd: Msd) -> None:
    plain, two = (json.loads(msd("distill", str(tiny), *w, "--dry-run", "--json").stdout) for w in ([], [TWO]))
    assert two["flops"]["teacher"] > plain["flops"]["teacher"] > 0


def test_they_are_refused_where_they_cannot_be(tiny: Path, msd: Msd) -> None:
    done = msd("distill", str(tiny), ONE, "fsdp=true")
    assert done.returncode == 2 and "teacher.stages" in done.stderr
    done = msd("distill", str(tiny), "stages.0.fake_guidance=zero")
    assert done.returncode == 2 and "never trained without a class" in done.stderr
    assert not Path("runs").exists()


def test_a_given_teacher_goes_through_its_stages_again(tiny: Path, tmp_path: Path) -> None:
    """What went through equal stages in another run is the teacher of another round."""
    first, second = RunDir(tmp_path / "runs/first"), RunDir(tmp_path / "runs/second")
    data, on = open_data(load(tiny).data), torch.device("cpu")
    _, before = teacher.provide(first, load(tiny, [ONE, "pairs.count=16"]), data, on, silent)
    again = load(tiny, [ONE, "pairs.count=16", f"teacher.path={first.teacher}"])
    _, after = teacher.provide(second, again, data, on, silent)
    assert before != after
    (second.student(0) / "0-dm").mkdir(parents=True)
    (second.student(0) / "0-dm/metrics.jsonl").touch()  # it has begun
    shutil.rmtree(second.shared)
    assert teacher.provide(second, again, data, on, silent)[1] == after, "and goes on with what it has"
    assert not list(second.shared.glob("teacher-*"))
    assert teacher.provide(second, again, data, on, silent)[1] == after


def test_what_is_stitched_later_is_no_part_of_the_reference(tiny: Path, tmp_path: Path) -> None:
    """The samples that the reference is known by are its own, also where the recipe stitches a small network to it."""
    data, on = open_data(load(tiny).data), torch.device("cpu")
    small = RunDir(tmp_path / "runs/small")
    teacher.provide(small, load(tiny, ["teacher.network.channels=8"]), data, on, silent)
    hashes = list[str]()
    for name, words in (("a", []), ("b", [f"teacher.stitch={{path: {small.teacher}, above: 1.0}}"])):
        run = RunDir(tmp_path / name / "runs/x")  # which share nothing
        teacher.provide(run, load(tiny, [ONE, "pairs.count=16", *words]), data, on, silent)
        hashes.append(records.model(run.teacher / MODEL)["sha256"])
    assert hashes[0] == hashes[1]
