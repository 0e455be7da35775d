"""A run that msd 0.1.0 left half done: it goes on, ends as that version ended it, and can be read."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from msdcli.rundir import RunDir
from tests.conftest import Msd

OLD = Path(__file__).parent / "run_of_version_0.1.0.zip"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The run, its recipe, what other runs share with it, and how it ended."""
    with zipfile.ZipFile(OLD) as file:
        file.extractall(tmp_path)
    return tmp_path


@pytest.mark.parametrize("shared", [True, False], ids=["with what is shared", "alone"])
def test_it_goes_on_and_ends_as_it_did(old: Path, msd: Msd, shared: bool) -> None:
    folder = RunDir(old / "runs/old").shared
    before = sorted(path.name for path in folder.iterdir())
    if not shared:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    done = msd("distill", "old.yaml")
    assert done.returncode == 0, done.stderr
    made = {
        path.name for path in folder.iterdir() if not path.name.startswith(("features-", "halves-", "rows_of_teacher-"))
    }
    assert not any(name.startswith("teacher-") for name in made - {*before}), "it has its teacher"
    assert not shared or made == {*before}, "pairs that are there are not made again"
    found, wanted = (
        load_file(path)
        for path in (old / "runs/old/students/1/1-adm/model.safetensors", old / "expected/model.safetensors")
    )
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)
    done = msd("sample", "runs/old", "--all", "-n", "4", "--format", "npz")
    assert done.returncode == 0, done.stderr
    (drawn,) = (old / "runs/old/samples").rglob("*.npz")
    with np.load(drawn) as mine, np.load(old / "expected/samples.npz") as theirs:
        assert sorted(mine.files) == sorted(theirs.files)
        for name in theirs.files:
            np.testing.assert_allclose(mine[name], theirs[name], atol=1e-4)
    for words in (["status", "runs/old", "--json"], ["fid", "runs/old", "--json"], ["report", "runs/old"]):
        done = msd(*words)
        assert done.returncode == 0, done.stderr


def test_its_data_are_compared_as_that_version_did(old: Path, msd: Msd) -> None:
    record = old / "runs/old/run.json"
    known = json.loads(record.read_text())
    assert "fingerprints" not in known
    record.write_text(json.dumps(known | {"data": "0" * 64}))
    done = msd("distill", "old.yaml")
    assert (done.returncode, "begun with other data" in done.stderr) == (2, True)


def test_a_record_of_a_version_to_come_is_refused(old: Path, msd: Msd) -> None:
    record = old / "runs/old/run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"fingerprints": 3}))
    done = msd("distill", "old.yaml")
    assert (done.returncode, "fingerprints of version 3" in done.stderr) == (2, True)
