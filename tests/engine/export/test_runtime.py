"""msd sample --runtime onnx: the run's samples by ONNX Runtime, from programs that are checked and kept."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import msdcli
from msdcli.data.images import to_uint8
from msdcli.diffusion.generator import Generator
from msdcli.engine.checkpoints.model import save_model
from msdcli.engine.export import runtime
from msdcli.errors import MismatchError, UserError
from msdcli.recipe import load
from msdcli.rundir import RunDir
from tests.conftest import Msd
from tests.engine.export.test_export import SMALL, network, trained

CLASSES = [3, 0, 7, 2, 1, 1]


def programs(run: Path) -> list[Path]:
    return sorted(run.glob("programs/*/model.onnx"))


@pytest.fixture
def run(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two students whose programs are there: writing one takes seconds, and an export's are the same."""

    def write(generator: Generator, path: Path, who: str) -> int:
        shutil.copyfile(small.parents[1] / "given" / "students" / who.split()[-1] / "model.onnx", path)
        return 4

    monkeypatch.setattr(runtime, "write", write)
    return trained(tmp_path, SMALL)


def test_the_runs_samples_within_a_grey_level(run: Path) -> None:
    """Routed, in pieces, with the same noise of image i; a program is written once, and needs no weights in memory."""
    wanted = msdcli.sample(run, CLASSES, seed=5)
    by_onnx = msdcli.load(run, runtime="onnx")
    got = by_onnx.sample(CLASSES, seed=5)
    assert by_onnx.runtime == "onnx" and wanted.std() > 0.01
    assert (got - wanted).abs().max() < 1e-4
    assert (to_uint8(got).int() - to_uint8(wanted).int()).abs().max() <= 1
    assert not by_onnx._loaded, "the networks stay in memory"
    many = by_onnx.sample([1] * 9, seed=5)  # a program takes 4 at once here
    torch.testing.assert_close(many, msdcli.sample(run, [1] * 9, seed=5), rtol=0, atol=1e-4)

    written = programs(run)
    assert [path.parent.name.split("-")[0] for path in written] == ["0", "1"]
    before = [path.stat().st_mtime_ns for path in written]
    again = msdcli.sample(run, CLASSES, seed=5, runtime="onnx")
    assert torch.equal(again, got)
    assert [path.stat().st_mtime_ns for path in programs(run)] == before

    by_onnx.max_resident = 1
    by_onnx.sample(CLASSES)
    assert len(by_onnx._programs) == 1


@pytest.mark.slow
def test_several_steps_and_fewer_of_them(tmp_path: Path) -> None:
    """Programs that are really written; fewer steps are another one, and both are kept."""
    pytest.importorskip("onnxscript")
    run = trained(tmp_path, SMALL, "[2.5, 0.8]")
    for steps in (1, 2):
        got = msdcli.sample(run, [3, 3], seed=1, steps=steps, runtime="onnx")
        torch.testing.assert_close(got, msdcli.sample(run, [3, 3], seed=1, steps=steps), rtol=0, atol=1e-4)
    assert len(programs(run)) == 2


def test_records_name_the_runtime(run: Path, msd: Msd) -> None:
    for runtime_, said in (("torch", None), ("onnx", "onnx")):
        done = msd("sample", str(run), "--classes", "1", "-n", "2", "--runtime", runtime_, "--format", "png", "--json")
        made = json.loads(done.stdout)
        assert made["runtime"] == runtime_
        assert json.loads((Path(made["file"]) / "dataset.json").read_text()).get("runtime") == said


def test_other_weights_are_another_program_and_the_old_one_goes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user put beside a program stays, and so does the program."""
    monkeypatch.setattr(runtime, "compared", lambda *_: {})  # the copied program is of the old weights
    msdcli.sample(run, [1], runtime="onnx")
    (old,) = programs(run)
    stage = load(run / "recipe.yaml").stages[0].model_dump(mode="json")
    folder = RunDir(run).stage(1, 0, "dm")
    save_model(folder, network(SMALL, seed=9), {"steps": 1, "stage": stage})
    msdcli.sample(run, [1], runtime="onnx")
    (new,) = programs(run)
    assert new.parent != old.parent and not old.parent.exists()

    (new.parent / "notes.txt").write_text("mine")
    save_model(folder, network(SMALL, seed=8), {"steps": 1, "stage": stage})
    msdcli.sample(run, [1], runtime="onnx")
    assert len(programs(run)) == 2 and (new.parent / "notes.txt").exists()


def test_a_changed_program_is_refused(run: Path) -> None:
    msdcli.sample(run, [1], runtime="onnx")
    (program,) = programs(run)
    program.write_bytes(program.read_bytes() + b"0")
    with pytest.raises(UserError, match="was changed since msd wrote it"):
        msdcli.sample(run, [1], runtime="onnx")


def test_a_program_that_differs_is_not_kept(run: Path) -> None:
    stage = load(run / "recipe.yaml").stages[0].model_dump(mode="json")
    save_model(RunDir(run).stage(0, 0, "dm"), network(SMALL, seed=7), {"steps": 1, "stage": stage})
    with pytest.raises(MismatchError, match=r"student 0, runtime onnx: .* differ .* by"):
        msdcli.sample(run, [0], runtime="onnx")
    assert not programs(run)


def test_what_cannot_be_is_said(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="runtime 'tensorrt' does not exist"):
        msdcli.load(small, runtime="tensorrt")
    with pytest.raises(UserError, match="for the CPU"):
        runtime.load(small, "meta", runtime="onnx")

    def unsupported(*_: object) -> None:
        raise RuntimeError("no operator of that kind")

    with monkeypatch.context() as patch:
        patch.setattr("msdcli.engine.export.torch.program", unsupported)
        with pytest.raises(UserError, match=r"student 0: .*no operator of that kind"):
            runtime.write(msdcli.load(small).student(0), small / "never", "student 0")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(UserError, match="ONNX needs its libraries") as error:
            msdcli.load(small, runtime="onnx")
    assert "msdcli[onnx]" in str(error.value.hint)
