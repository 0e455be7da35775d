"""The whole path through the real command line: golden losses, resuming after any death, refusals."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from msdcli import nets
from msdcli.engine.checkpoints.tensors import load_tensors
from msdcli.engine.measure import fid
from msdcli.errors import UserError
from msdcli.rundir import lock
from tests.conftest import TINY, Msd, command, environment


def weights(run: Path) -> dict[str, bytes]:
    """Every model of a run, as bytes."""
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("model.safetensors"))}


def test_a_finished_run_has_everything_in_its_place(finished: Path) -> None:
    names = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file()}
    wanted = {"recipe.yaml", "run.json", "partition.json", "teacher/model.safetensors", "teacher/model.json"}
    wanted |= {f"students/{k}/0-dm/{f}" for k in (0, 1) for f in ("model.safetensors", "model.json", "metrics.jsonl")}
    wanted |= {"samples/grid.png", "metrics/l1_toy2d.json"}
    assert wanted <= names
    assert not [name for name in names if name.endswith(".tmp")]
    model = json.loads((finished / "students/0/0-dm/model.json").read_text())
    assert model["cost"]["images"] == 6 * 3 * 16
    assert model["cost"]["flops"] > 1e6 and model["cost"]["seconds"] > 0


def test_golden_losses(finished: Path) -> None:
    """What the losses were when they were last believed in; a refactoring must not move them."""
    lines = [json.loads(x) for x in (finished / "students/1/0-dm/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    golden = json.loads((Path(__file__).parent / "golden.json").read_text())
    for line, wanted in zip(lines, golden["tiny student 1"], strict=True):
        assert line["losses"] == pytest.approx(wanted, rel=1e-4)


def test_same_command_again_changes_nothing(
    finished: Path, msd: Msd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished.parent, tmp_path / "runs")
    before, file = weights(tmp_path / "runs/tiny"), tmp_path / "runs/tiny/metrics/l1_toy2d.json"
    measured = file.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(fid, "MeasurementRows", lambda *_, **__: pytest.fail("nothing has changed: it is measured"))
        done = msd("distill", "runs/tiny", "--json")
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "runs/tiny") == before and file.read_text() == measured
    assert json.loads(done.stdout)["measurement"] == json.loads(measured)
    done = msd("distill", "runs/tiny", "evaluation.samples=150")
    assert done.returncode == 0 and json.loads(file.read_text())["samples"] == 150, done.stderr


def test_students_trained_alone_or_by_workers_are_the_same(finished: Path, msd: Msd, tiny: Path) -> None:
    alone = msd("distill", "tiny.yaml", "--student", "1")
    assert alone.returncode == 0, alone.stderr
    assert "students still to do: 0" in alone.stdout
    rest = msd("distill", "tiny.yaml", "workers=2")
    assert rest.returncode == 0, rest.stderr
    assert weights(tiny.parent / "runs/tiny") == weights(finished)


def test_more_steps_continue_a_finished_run(finished: Path, msd: Msd, tmp_path: Path) -> None:
    shutil.copytree(finished.parent, tmp_path / "runs")
    done = msd("distill", "runs/tiny", "stages.0.steps=8")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "runs/tiny/students/0/0-dm/model.json").read_text())["steps"] == 8
    fewer = msd("distill", "runs/tiny", "stages.0.steps=7")
    assert (fewer.returncode, "stages.0.steps differ" in fewer.stderr) == (2, True)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_sigkill_at_any_moment_loses_nothing(finished: Path, msd: Msd, tiny: Path, seed: int) -> None:
    """Kill the run (and with it its workers) again and again; the end is bit-equal to an undisturbed run."""
    rng = random.Random(seed)
    for _ in range(3):
        process = subprocess.Popen(
            command("distill", "tiny.yaml", "workers=2"),
            cwd=tiny.parent,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(rng.uniform(2.0, 6.0))
        process.kill()
        process.wait()
    time.sleep(0.5)  # orphaned workers notice
    done = msd("distill", "tiny.yaml", "workers=2")
    assert done.returncode == 0, done.stderr
    assert weights(tiny.parent / "runs/tiny") == weights(finished)
    assert not list((tiny.parent / "runs").rglob("*.tmp"))


def test_resuming_between_any_two_steps_is_bit_exact(finished: Path, msd: Msd, tiny: Path) -> None:
    """With checkpoint_seconds 0 a checkpoint follows every step; Ctrl-C lands between two of them."""
    text = TINY.replace("steps: 6,", "steps: 60,").replace("steps: 12,", "steps: 200,")
    tiny.write_text(text)
    reference = tiny.parent / "reference"
    assert msd("distill", "tiny.yaml", f"run={reference}/runs/tiny").returncode == 0
    process = subprocess.Popen(
        command("distill", "tiny.yaml"), cwd=tiny.parent, env=environment(), stderr=subprocess.PIPE
    )
    log = tiny.parent / "runs/tiny/students/0/0-dm/metrics.jsonl"
    while not log.exists() or not log.read_text():
        time.sleep(0.01)
        assert process.poll() is None, process.stderr and process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"the same command continues" in said and b"Traceback" not in said
    assert msd("distill", "tiny.yaml").returncode == 0
    assert weights(tiny.parent / "runs/tiny") == weights(reference / "runs/tiny")
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 60


def test_a_held_student_is_refused_by_number_and_left_alone_otherwise(finished: Path, msd: Msd, tmp_path: Path) -> None:
    shutil.copytree(finished.parent, tmp_path / "runs")
    run = tmp_path / "runs/tiny"
    shutil.rmtree(run / "students/1/0-dm")
    with lock(run / "students/1", "student 1"):
        one = msd("distill", "runs/tiny", "--student", "1")
        assert one.returncode == 2
        assert f"student 1 is being worked on by process {os.getpid()} on" in one.stderr
        everyone = msd("distill", "runs/tiny")
        assert everyone.returncode == 75
        assert f"student 1 (process {os.getpid()} on" in everyone.stderr
        state = json.loads(msd("status", "runs/tiny", "--json").stdout)
        assert f"process {os.getpid()}" in state["students"][1]["running"]
    assert msd("distill", "runs/tiny").returncode == 0


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "partition={method: explicit, students: 2, parts: [[0, 1, 2, 3], [3, 4, 5, 6, 7]]}",
            "3 is in more than one part",
        ),
        ("partition={method: explicit, students: 2, parts: [[0, 1, 2, 3], [4, 5, 6]]}", "7 is in no part"),
        ("partition.students=9", "9 students for 8 conditions"),
        ("teacher.path=nowhere", "no model at nowhere"),
        ("teacher.network={kind: unet}", "is for images"),
        ("stages.0.lr_of={head: 1e-3}", "lr_of names 'head'"),
        ("device=cuda:7", "cuda:7 is not here"),
        ("stages=[{objective: tsm}]", "makes no student that gives images"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(msd: Msd, tiny: Path, override: str, said: str) -> None:
    done = msd("distill", "tiny.yaml", override)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in tiny.parent.iterdir()] == ["tiny.yaml"]


def test_another_recipe_is_refused_by_key(finished: Path, msd: Msd, tmp_path: Path) -> None:
    shutil.copytree(finished.parent, tmp_path / "runs")
    done = msd("distill", "runs/tiny", "stages.0.lr=0.5")
    assert done.returncode == 2
    assert "belongs to another recipe: stages.0.lr differ" in done.stderr


@pytest.mark.parametrize("file", ["teacher/model.safetensors", "students/0/0-dm/model.safetensors"])
def test_damaged_weights_are_named(finished: Path, msd: Msd, tmp_path: Path, file: str) -> None:
    shutil.copytree(finished.parent, tmp_path / "runs")
    path = tmp_path / "runs/tiny" / file
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.unlink()
        path.write_bytes(damaged)
        done = msd("fid", "runs/tiny")
        assert done.returncode == 2
        assert file in done.stderr and "Traceback" not in done.stderr


def test_a_teacher_from_elsewhere_is_used_and_a_misfit_refused(finished: Path, msd: Msd, tiny: Path) -> None:
    done = msd("distill", "tiny.yaml", f"teacher.path={finished / 'teacher'}", "run=runs/other")
    assert done.returncode == 0, done.stderr
    mine = weights(tiny.parent / "runs/other")
    assert mine["teacher/model.safetensors"] == weights(finished)["teacher/model.safetensors"]
    misfit = msd("distill", "digits", f"teacher.path={finished / 'teacher'}", "run=runs/misfit")
    assert (misfit.returncode, "makes images of shape" in misfit.stderr) == (2, True)


def test_a_full_disk_is_one_sentence_and_resumable(finished: Path, tiny: Path) -> None:
    """Files may not grow past a limit, as on a full disk; once it is lifted the same command finishes."""
    limit = "import resource, sys, runpy, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)); sys.argv = ['msd', 'distill', 'tiny.yaml']; "
    limit += "runpy.run_module('msdcli', run_name='__main__')"
    done = subprocess.run(
        [*command()[:1], "-c", limit], cwd=tiny.parent, env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr and "error:" in done.stderr and "the same command continues" in done.stderr
    assert not list((tiny.parent / "runs").rglob("*.tmp"))
    again = subprocess.run(
        command("distill", "tiny.yaml"), cwd=tiny.parent, env=environment(), capture_output=True, timeout=200
    )
    assert again.returncode == 0
    assert weights(tiny.parent / "runs/tiny") == weights(finished)


def test_state_holds_everything_and_a_truncated_one_is_named(finished: Path, tmp_path: Path) -> None:
    state = load_file(finished / "students/0/0-dm/state.safetensors")
    assert {name.split(".")[0] for name in state} == {"student", "fake", "ema", "optimizer"}
    path = tmp_path / "state.safetensors"
    path.write_bytes((finished / "students/0/0-dm/state.safetensors").read_bytes()[:500])
    with pytest.raises(UserError, match="damaged or truncated"):
        load_tensors(path)


def test_a_stage_inherits_exactly_what_the_stage_before_saved(finished: Path) -> None:
    from msdcli.engine.checkpoints import storage
    from msdcli.engine.distributed.group import SINGLE_PROCESS
    from msdcli.recipe.networks import MLPSettings

    def new() -> torch.nn.Module:
        network = MLPSettings(channels=16, blocks=1)
        return nets.build(network, shape=(2,), num_classes=8, sigma_data=0.5)

    networks = {"student": new(), "fake": new(), "head": torch.nn.Linear(2, 2)}
    head = networks["head"].weight.detach().clone()
    assert storage.inherit(networks, finished / "students/0/0-dm", SINGLE_PROCESS) == ["fake", "student"]
    state = load_file(finished / "students/0/0-dm/state.safetensors")
    for name in ("student", "fake"):
        assert all(torch.equal(v, state[f"{name}.{k}"]) for k, v in networks[name].state_dict().items())
    assert torch.equal(networks["head"].weight, head)
