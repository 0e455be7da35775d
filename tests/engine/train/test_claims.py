"""A command that is refused changes nothing, and what a run costs does not depend on how often it was stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from msdcli.engine import pipeline
from msdcli.engine.checkpoints.model import load_model, save_model
from msdcli.engine.distributed.group import SINGLE_PROCESS
from msdcli.engine.tracking.events import silent
from msdcli.engine.tracking.presence import attending
from msdcli.engine.train.log import TrainLog
from msdcli.errors import CONTINUES, WHOLE, LockedError, WorkerError, explain, resumable
from msdcli.rundir import RunDir, lock
from tests.conftest import TINY, Msd


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunDir:
    shutil.copytree(finished.parent, tmp_path / "runs")
    return RunDir(tmp_path / "runs" / "tiny")


def records(run: RunDir) -> tuple[bytes, bytes]:
    return run.recipe_file.read_bytes(), run.record_file.read_bytes()


def test_more_steps_wait_for_those_at_work(run: RunDir, msd: Msd, tiny: Path) -> None:
    before = records(run)
    with attending(run), lock(run.student(1), "student 1"):
        for words in (["stages.0.steps=8"], ["stages.0.steps=8", "--student", "0"]):
            done = msd("distill", "tiny.yaml", *words)
            assert (done.returncode, "nothing was changed" in done.stderr) == (2, True), done.stderr
        assert records(run) == before
        assert msd("distill", "tiny.yaml", "keep=3", "--student", "0").returncode == 0, (
            "by the same recipe all may work"
        )
        assert records(run)[0] == before[0], "what training does not depend on waits"
    assert msd("distill", "tiny.yaml", "stages.0.steps=8", "--student", "0").returncode == 0
    assert run.recipe().stages[0].steps == 8


def test_a_held_student_is_refused_before_anything_is_noted(run: RunDir, msd: Msd, tiny: Path) -> None:
    before = records(run)
    with lock(run.student(0), "student 0"):
        done = msd("distill", "tiny.yaml", "--student", "0")
    assert (done.returncode, "student 0 is being worked on" in done.stderr) == (2, True), done.stderr
    assert records(run) == before


def test_other_data_are_refused_before_anything_is_noted(run: RunDir, msd: Msd, tiny: Path) -> None:
    known = json.loads(run.record_file.read_text())
    run.record_file.write_text(json.dumps(known | {"data": "0" * 64}))
    before = records(run)
    done = msd("distill", "tiny.yaml", "stages.0.steps=8", "keep=5")
    assert (done.returncode, "with other data" in done.stderr) == (2, True), done.stderr
    assert records(run) == before


@pytest.mark.parametrize("number", ["-1", "2"])
def test_students_that_do_not_exist_are_refused(msd: Msd, tiny: Path, number: str) -> None:
    assert msd("distill", "tiny.yaml", f"--student={number}").returncode == 2
    assert [p.name for p in tiny.parent.iterdir()] == ["tiny.yaml"]


def test_a_student_that_does_not_exist_is_refused_in_python(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import msdcli

    monkeypatch.chdir(tiny.parent)
    with pytest.raises(msdcli.UserError, match="student -1 does not exist"):
        msdcli.distill("tiny.yaml", only=-1)


@pytest.mark.parametrize("at", [2, 3, 5])
def test_a_cut_interval_costs_what_an_undisturbed_one_does(
    run: RunDir, msd: Msd, tiny: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Killed in a step, inside an interval of the log: the cost belongs to the checkpoint that is gone on from."""
    wanted = json.loads((run.student(0) / "0-dm" / "model.json").read_text())["cost"]
    shutil.rmtree(run.root)
    tiny.write_text(TINY.replace("fake_updates: 2, log_every: 2", "fake_updates: 2, log_every: 100"))
    count = TrainLog._count

    def killed(log: TrainLog, flops: list[int], elsewhere: float) -> None:
        if log.what == "student 0 dm" and log.state.step == at:
            raise KeyboardInterrupt
        count(log, flops, elsewhere)

    monkeypatch.setattr(TrainLog, "_count", killed)
    assert msd("distill", "tiny.yaml", "--student", "0").returncode == 130
    monkeypatch.undo()
    monkeypatch.chdir(tiny.parent)
    assert msd("distill", "tiny.yaml", "--student", "0").returncode == 0
    cost = json.loads((run.student(0) / "0-dm" / "model.json").read_text())["cost"]
    assert (cost["images"], cost["flops"]) == (wanted["images"], wanted["flops"])
    assert cost["images"] == 6 * 16 * 3


# What the system says.


def ended(error: BaseException, how: str | None = None) -> tuple[int, str, str | None]:
    try:
        if how is None:
            raise error
        with resumable(CONTINUES), resumable(how):
            raise error
    except type(error) as caught:
        return explain(caught)


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error", "f"), OSError(28, "No space left", "f"), MemoryError()]
)
def test_only_training_speaks_of_its_checkpoint(error: Any) -> None:
    assert "checkpoint" not in str(ended(type(error)(*error.args))) and "same command" not in str(ended(error))
    assert WHOLE in str(ended(type(error)(*error.args), WHOLE))


@pytest.mark.parametrize("number", [30, 36, 20, 21, 40, 13, 1])
def test_a_place_that_cannot_be_written_is_the_users_to_change(number: int) -> None:
    """Read-only, a name too long, a file for a folder, a folder for a file, a circle of links, no permission."""
    code, said, _ = ended(OSError(number, "It Is So", "/place"))
    assert code == 2 and "/place" in said


def test_a_worker_that_failed_is_gone_on_from() -> None:
    assert ended(WorkerError("x"), WHOLE) == (1, "x", WHOLE)


def test_another_teacher_at_the_same_path_never_takes_the_runs_place(finished: Path, msd: Msd, tiny: Path) -> None:
    """A run that has students keeps the teacher that they were made from; one that has none takes the better one."""
    given, run = tiny.parent / "given", RunDir(tiny.parent / "runs/tiny")
    shutil.copytree(finished / "teacher", given)
    words = ("distill", "tiny.yaml", f"teacher.path={given}")
    assert msd(*words, "--teacher").returncode == 0
    model = given / "model.safetensors"
    net, described = load_model(given)
    with torch.no_grad():
        for weights in net.parameters():
            weights.mul_(1.001)
    save_model(given, net, {k: v for k, v in described.items() if k == "steps"})
    assert not run.begun()
    done = msd(*words)
    assert done.returncode == 0, done.stderr
    mine = (run.teacher / "model.safetensors").read_bytes()
    assert mine == model.read_bytes() != (finished / "teacher/model.safetensors").read_bytes()
    model.unlink()  # it may be the same file as the run's
    (given / "model.json").unlink()
    shutil.copytree(finished / "teacher", given, dirs_exist_ok=True)
    refused = msd(*words)
    assert (refused.returncode, "other weights of the teacher" in refused.stderr) == (2, True), refused.stderr
    assert (run.teacher / "model.safetensors").read_bytes() == mine
    shutil.rmtree(run.teacher)  # what is lost does not come back as another
    refused = msd(*words)
    assert refused.returncode == 2 and not (run.teacher / "model.json").exists(), refused.stderr
    save_model(given, net, {k: v for k, v in described.items() if k == "steps"})
    assert msd(*words).returncode == 0, "the right one is back"
    assert (run.teacher / "model.safetensors").read_bytes() == mine
    assert msd("sample", "runs/tiny", "--classes", "0").returncode == 0


def test_nobody_gets_another_teacher_while_others_are_at_work(finished: Path, msd: Msd, tiny: Path) -> None:
    given, run = tiny.parent / "given", RunDir(tiny.parent / "runs/tiny")
    shutil.copytree(finished / "teacher", given)
    words = ("distill", "tiny.yaml", f"teacher.path={given}")
    assert msd(*words, "--teacher").returncode == 0
    before = (run.teacher / "model.safetensors").read_bytes()
    net, described = load_model(given)
    with torch.no_grad():
        next(net.parameters()).mul_(1.001)
    save_model(given, net, {k: v for k, v in described.items() if k == "steps"})
    with attending(run):
        refused = msd(*words)
    assert (refused.returncode, "other weights of the teacher" in refused.stderr) == (2, True), refused.stderr
    assert (run.teacher / "model.safetensors").read_bytes() == before


def test_a_checkpoint_in_pieces_is_a_beginning(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert not run.begun()
    (run.student(0) / "0-dm" / "state").mkdir(parents=True)
    assert run.begun()


def test_a_student_that_two_reach_at_once_is_left_to_the_first(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen it free: the second finds it locked, and goes on."""
    shutil.rmtree(run.student(0) / "0-dm")
    monkeypatch.setattr(pipeline, "holder_of", lambda folder: None)
    training = pipeline.TrainingRun(run, run.recipe(), *[None] * 5, SINGLE_PROCESS)  # type: ignore[arg-type]
    with lock(run.student(0), "student 0"):
        training.train([0], silent, skip_held=True)
        with pytest.raises(LockedError, match="student 0 is being worked on"):
            training.train([0], silent, skip_held=False)
