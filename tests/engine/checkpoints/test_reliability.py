"""What goes wrong around training: updates that are not finite, damaged files, full disks, other data, signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from msdcli.diffusion.draws import Draws
from msdcli.engine.checkpoints import disk, tensors
from msdcli.engine.checkpoints.files import stored
from msdcli.engine.checkpoints.tensors import load_tensors
from msdcli.engine.checkpoints.train_state import TrainState
from msdcli.engine.train import loop as distill
from msdcli.engine.train.loop import TrainOptions
from msdcli.engine.train.student import check_stage
from msdcli.errors import UserError
from msdcli.objectives import Objective
from msdcli.objectives.base import Turn
from msdcli.recipe.stages import EdmSettings
from msdcli.rundir import sweep_temporaries, writing
from tests.conftest import TINY, Msd, command, environment
from tests.engine.train.test_distill import weights
from tests.engine.train.test_training import DIGITS, EVERY_STEP, run, same


class Fickle(Objective):
    """A line through points; at `bad` steps one of the losses is not finite."""

    def __init__(self, bad: set[int], how: float = torch.nan) -> None:
        torch.manual_seed(0)
        self.student, self.bad, self.how = torch.nn.Linear(3, 1), bad, how
        self.nets = {"student": self.student}

    def turns(self, step: int) -> Iterator[Turn]:
        self.step = step
        yield ("student",), self.loss

    def loss(self, draws: Draws) -> Tensor:
        self.sigma = torch.arange(8.0)
        losses = self.student(draws.normal("x", (3,))).square().squeeze(1)
        return losses * torch.where((self.sigma == 5) & (self.step in self.bad), self.how, 1.0)


def fickle(
    folder: Path, bad: set[int], *, how: float = torch.nan, max_skipped: int = 10, steps: int = 12, **options: float
) -> tuple[TrainState, list[str]]:
    said: list[str] = []
    state = distill.train(
        Fickle(bad, how),
        EdmSettings(steps=steps, batch=8, lr=0.01, lr_hold=1.0, log_every=4),
        distill.Source(DIGITS, range(10)),
        folder,
        key=("fickle",),
        what="f",
        options=TrainOptions(max_skipped=max_skipped, **{"checkpoint_seconds": 0, **options}),  # type: ignore[arg-type]
        report=lambda event: said.append(event) if isinstance(event, str) else None,
    )
    return state, said


def ages(folder: Path) -> list[int]:
    return [age for age, _ in stored(folder)]


def moments(state: TrainState) -> Tensor:
    return torch.cat([v.flatten() for v in state.optimizers["student"].state_dict()["state"][0].values()])


@pytest.mark.parametrize("how", [torch.nan, torch.inf])
def test_an_update_that_is_not_finite_is_as_if_it_had_not_been(tmp_path: Path, how: float) -> None:
    """A step that is skipped leaves weights and moments alone: the run is the one without that step's draws."""
    state, said = fickle(tmp_path / "bad", {11}, how=how)
    good, nothing = fickle(tmp_path / "good", set(), steps=11)
    assert torch.equal(state.nets["student"].weight, good.nets["student"].weight)
    assert torch.equal(moments(state), moments(good))
    assert said == ["f: 1 of 4 updates of student were not finite and skipped: its loss at step 12 at noise level "
                    "sigma = 5"]  # fmt: skip
    assert nothing == []
    lines = [json.loads(line) for line in (tmp_path / "bad/metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"]["student"] for line in lines] == [0, 0, 1]
    assert all(line["losses"]["student"] > 0 and line["gradient_norms"]["student"] > 0 for line in lines)


def test_too_many_in_a_row_stop_the_run_with_a_diagnosis_and_the_last_good_state(tmp_path: Path) -> None:
    fickle(tmp_path / "apart", {1, 2, 4, 5, 7, 8}, max_skipped=3)
    with pytest.raises(UserError, match=r"6 updates of student in a row .* loss at step 7 at noise level sigma = 5"):
        fickle(tmp_path / "row", {*range(6, 12)}, max_skipped=3)
    assert load_tensors(tmp_path / "row/state.safetensors")[1]["step"] == "6"


def test_one_damaged_checkpoint_costs_only_itself(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", EdmSettings(steps=8, batch=8, log_every=2, lr_hold=1.0))
    run(tmp_path / "cut", EdmSettings(steps=6, batch=8, log_every=2, lr_hold=1.0))
    newest = tmp_path / "cut/state.safetensors"
    assert ages(newest.parent) == [0, 1]
    content = newest.read_bytes()
    for damaged in (content[: len(content) // 2], content[:-1] + bytes([content[-1] ^ 1]), b""):
        newest.unlink()
        newest.write_bytes(damaged)
        state, said = load(newest.parent)
        assert state.step == 5
        assert len(said) == 1 and "going on from the checkpoint before it, of step 5" in said[0] and "\n" not in said[0]
    newest.unlink()
    newest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    parts = run(tmp_path / "cut", EdmSettings(steps=8, batch=8, log_every=2, lr_hold=1.0))
    assert same(whole, parts)
    for path in newest.parent.glob("state*"):
        path.write_bytes(content[:100])
    with pytest.raises(UserError, match="damaged or truncated"):
        run(tmp_path / "cut", EdmSettings(steps=8, batch=8, log_every=2, lr_hold=1.0))


def load(folder: Path) -> tuple[TrainState, list[str]]:
    from msdcli.engine.checkpoints.manager import CheckpointManager
    from msdcli.engine.distributed.group import SINGLE_PROCESS

    settings = EdmSettings(steps=1, batch=8)
    state, said = run(folder.parent / "fresh", settings), list[str]()
    CheckpointManager(state, folder, 2, SINGLE_PROCESS).load(lambda event: said.append(str(event)))
    shutil.rmtree(folder.parent / "fresh")
    return state, said


def test_as_many_checkpoints_stay_as_are_kept(tmp_path: Path) -> None:
    settings = EdmSettings(steps=5, batch=8)
    for keep, kept in [(3, [0, 1, 2]), (1, [0])]:
        run(tmp_path / "t", settings, options=TrainOptions(checkpoint_seconds=0, keep=keep))
        assert ages(tmp_path / "t") == kept
    steps = [load_tensors(p)[1]["step"] for p in sorted((tmp_path / "t").glob("state*"))]
    assert steps == ["5"]


def test_what_a_writer_meets_stops_training_and_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fickle(tmp_path, set(), steps=4)
    monkeypatch.setattr(tensors, "save_file", _full)
    with pytest.raises(OSError, match="No space left"):
        fickle(tmp_path, set(), steps=12)
    assert load_tensors(tmp_path / "state.safetensors")[1]["step"] == "4"
    assert not list(tmp_path.glob(".*.tmp"))


def _full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    (tmp_path / ".a.dead.tmp").write_text("half")
    (tmp_path / ".c.dead.tmp").mkdir()
    killed = "import os; from msdcli.rundir import *\nwith writing(Path('d')) as t: t.write_text('half'); os._exit(1)"
    subprocess.run([sys.executable, "-c", killed], cwd=tmp_path, env=environment())
    assert list(tmp_path.glob(".d.*.tmp/d"))
    with writing(tmp_path / "b") as temporary:
        (tmp_path / "other").write_text("whole")
        os.replace(tmp_path / "other", temporary)  # as a library may: the file is another now
        sweep_temporaries(tmp_path)
        assert list(tmp_path.iterdir()) == [temporary.parent]
    assert list(tmp_path.iterdir()) == [tmp_path / "b"] and (tmp_path / "b").read_text() == "whole"


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    msd: Msd, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda _: 100_000)
    done = msd("distill", "tiny.yaml")
    assert done.returncode == 2
    assert "bytes, the disk has 100,000 left" in done.stderr
    assert [p.name for p in tiny.parent.iterdir()] == ["tiny.yaml"]


def test_the_bytes_said_are_the_bytes_written(finished: Path, msd: Msd, tmp_path: Path) -> None:
    from msdcli.engine import pipeline
    from msdcli.recipe import load
    from msdcli.rundir import RunDir

    recipe = load(finished)
    data = pipeline.check(recipe)
    frozen, (student,) = pipeline.networks_on_meta(recipe, data)
    with torch.device("meta"):
        objectives = [[check_stage(stage, student, frozen) for stage in recipe.stages]]
    files = list(finished.glob("students/*/0-dm/*.safetensors"))
    written = sum(p.stat().st_size for p in files)
    fresh = disk.needed(RunDir(tmp_path / "nowhere"), recipe, objectives, 1)
    state = (finished / "students/0/0-dm/state.safetensors").stat().st_size
    assert fresh - disk.SMALL_FILES == pytest.approx(written + state, rel=0.1)  # headers are not counted
    left = disk.needed(RunDir(finished), recipe, objectives, 1) - disk.SMALL_FILES
    assert state < left < 1.5 * state, "what is written already is not asked for again"


@pytest.mark.parametrize(("what", "said"), [("data", "begun with other data"), ("teacher", "other weights of the tea")])
def test_other_data_or_another_teacher_are_refused(
    finished: Path, msd: Msd, tmp_path: Path, what: str, said: str
) -> None:
    shutil.copytree(finished.parent, tmp_path / "runs")
    record = tmp_path / "runs/tiny/run.json"
    known = json.loads(record.read_text())
    assert len(known["data"]) == len(known["teacher"]) == 64
    record.write_text(json.dumps(known | {what: "0" * 64}))
    done = msd("distill", "runs/tiny")
    assert (done.returncode, said in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("number", "workers", "code"),
    [(signal.SIGTERM, 1, 75), (signal.SIGUSR1, 2, 75), (signal.SIGINT, 1, 130)],
)
def test_a_signal_ends_a_run_with_a_checkpoint_and_a_way_to_go_on(
    msd: Msd, tiny: Path, number: int, workers: int, code: int
) -> None:
    tiny.write_text(TINY.replace("steps: 6,", "steps: 100000,").replace("seconds: 0", "seconds: 1000"))
    process = subprocess.Popen(
        command("distill", "tiny.yaml", f"workers={workers}"),
        cwd=tiny.parent,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tiny.parent / "runs/tiny/students/0/0-dm/metrics.jsonl"
    while not log.exists() or not log.read_text():
        time.sleep(0.01)
        assert process.poll() is None, process.stderr and process.stderr.read()
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert said.count("the same command continues") == said.count("stopping after this step") == 1, said
    assert "Traceback" not in said and "error:" not in said
    state = json.loads(msd("status", "runs/tiny", "--json").stdout)
    stage = state["students"][0]["stages"][0]
    assert state["resumable"] and state["students"][0]["resumable"]
    assert stage["state"] == "stopped" and stage["checkpoint"] >= stage["step"] > 0
    assert not list((tiny.parent / "runs").rglob("*.tmp"))


def test_a_signal_before_training_ends_the_command_as_well(tiny: Path) -> None:
    """While another process has the teacher, this one waits; SIGTERM ends the wait, with exit code 75."""
    from msdcli.rundir import lock

    with lock(tiny.parent / "runs/tiny", "the run directory"):
        process = subprocess.Popen(
            command("distill", "tiny.yaml"), cwd=tiny.parent, env=environment(), stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None and any("waiting for the run directory" in line for line in process.stderr)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "the same command continues" in said


def test_every_step_and_every_checkpoint_leave_the_same_bits(tmp_path: Path) -> None:
    """Writing behind the training's back never shows in what is trained."""
    settings = EdmSettings(steps=6, batch=8, lr_hold=1.0)
    often = run(tmp_path / "often", settings, options=EVERY_STEP)
    seldom = run(tmp_path / "seldom", settings, options=TrainOptions(checkpoint_seconds=1000))
    assert same(often, seldom)
    mine, theirs = (load_tensors(tmp_path / name / "state.safetensors")[0] for name in ("often", "seldom"))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_weights_of_a_resumed_run_are_those_of_the_undisturbed_one(finished: Path, msd: Msd, tiny: Path) -> None:
    assert msd("distill", "tiny.yaml", "keep=1").returncode == 0
    assert weights(tiny.parent / "runs/tiny") == weights(finished)


def test_a_damaged_end_of_a_stage_is_reached_again_from_the_checkpoint_before(msd: Msd, tiny: Path) -> None:
    stages = "stages=[{objective: tsm, steps: 3, batch: 8}, {objective: dm, steps: 2, batch: 8, fake_updates: 1}]"
    words = ("distill", "tiny.yaml", stages, "partition.students=1")
    assert msd(*words).returncode == 0
    run, wanted = tiny.parent / "runs/tiny", weights(tiny.parent / "runs/tiny")
    shutil.rmtree(run / "students/0/1-dm")
    last = run / "students/0/0-tsm/state.safetensors"
    content = last.read_bytes()
    last.unlink()
    last.write_bytes(content[:-20])
    done = msd(*words)
    assert done.returncode == 0, done.stderr
    assert "going on from the checkpoint before it, of step 2" in done.stderr
    assert weights(run) == wanted
