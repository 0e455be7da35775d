"""Data that change under a run: the run is not gone on with, and what is measured against them says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from msdcli.engine.inputs import teacher as teachers
from msdcli.rundir import RunDir
from tests.conftest import Msd, train_classifier_briefly

RECIPE = """
name: small
threads: 1
workers: 1
data: {name: folder, path: pics.npz}
teacher:
  network: {kind: unet, channels: 8, multipliers: [1], blocks: 1, embedding: 8}
  training: {steps: 2, batch: 8}
  solver: {steps: 2}
partition: {students: 2}
pairs: {count: 16, shard: 16}
stages:
  - {objective: dm, steps: 2, batch: 8, fake_updates: 1}
evaluation: {samples: 40}
"""
PIXELS = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(100) % 4


@pytest.fixture
def distilled(tmp_path: Path, msd: Msd, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run on noise; its data differ from `other` in pictures that no sparse look would see."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    train_classifier_briefly(monkeypatch, 2)
    (tmp_path / "small.yaml").write_text(RECIPE)
    np.savez(tmp_path / "pics.npz", images=PIXELS, labels=LABELS)
    done = msd("distill", "small.yaml", "run=runs/one")
    assert done.returncode == 0, done.stderr
    assert "right on 10 images that it was not trained on" in " ".join(done.stdout.split())
    return tmp_path


def shared(folder: Path, what: str) -> int:
    return len(list((folder / "runs/.shared").glob(f"{what}-*")))


def test_one_changed_picture_is_other_data(distilled: Path, msd: Msd, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = PIXELS.copy()
    pixels[1] ^= 255
    np.savez(distilled / "pics.npz", images=pixels, labels=LABELS)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("no teacher is trained for a run that is refused")

    with monkeypatch.context() as patch:
        patch.setattr(teachers, "_train", never)
        refused = msd("distill", "small.yaml", "run=runs/one")
    assert (refused.returncode, "begun with other data" in refused.stderr) == (2, True)
    measured = json.loads(msd("fid", "runs/one", "--json").stdout)
    assert any("data have changed since the run was begun" in warning for warning in measured["warnings"])
    done = msd("distill", "small.yaml", "run=runs/two")
    assert done.returncode == 0, done.stderr
    for what in ("data", "teacher", "pairs", "classifier"):
        assert shared(distilled, what) == 2, what
    np.savez(distilled / "pics.npz", images=PIXELS, labels=LABELS)
    again = msd("distill", "small.yaml", "run=runs/one")
    assert again.returncode == 0, again.stderr
    assert (shared(distilled, "teacher"), shared(distilled, "classifier")) == (2, 2), "the content counts, not the file"


def test_a_run_keeps_its_teacher_whatever_becomes_of_the_shared_one(
    distilled: Path, msd: Msd, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(distilled / "runs/one")
    shutil.rmtree(run.shared)
    before = (run.teacher / "model.safetensors").read_bytes()
    done = msd("distill", "small.yaml", "run=runs/one")
    assert done.returncode == 0, done.stderr
    assert (run.teacher / "model.safetensors").read_bytes() == before and shared(distilled, "teacher") == 0
