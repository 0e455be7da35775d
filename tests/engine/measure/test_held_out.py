"""A part of one's own pictures is trained on by nobody, and is what distances are measured against."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msdcli.data.digits import Digits
from msdcli.diffusion import draws
from msdcli.engine import proposal
from msdcli.engine.inputs import dataset
from msdcli.engine.inputs import teacher as teachers
from msdcli.engine.measure import fid
from msdcli.engine.measure.feature_metric import FidOptions
from msdcli.engine.measure.fid import EvaluationContext
from msdcli.engine.tracking.events import silent
from msdcli.recipe import load
from msdcli.recipe.data import DigitsSettings
from msdcli.rundir import RunDir
from tests.conftest import Msd, train_classifier_briefly

RECIPE = """
name: mine
threads: 1
workers: 1
data: {name: folder, path: mine, channels: 1, held_out: 0.1}
teacher:
  network: {kind: unet, channels: 8, multipliers: [1], blocks: 1, embedding: 8}
  training: {steps: 2, batch: 8}
  solver: {steps: 2}
pairs: {count: 32, shard: 32}
stages: [{objective: adm, steps: 1, batch: 8, fake_updates: 1}]
evaluation: {samples: 60, judge: off}
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of 200 digits in two classes, a recipe for it, and a classifier that is trained at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    train_classifier_briefly(monkeypatch, 2)
    pixels = ((Digits(DigitsSettings()).images(range(200)) + 1) * 127.5).round().numpy().astype(np.uint8)
    for i, picture in enumerate(pixels):
        path = tmp_path / "mine" / ("even", "odd")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture[0]).save(path)
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return tmp_path


def test_what_is_held_out_trains_nothing_and_measures(mine: Path, msd: Msd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fid, "REPLICATES", 0)
    seen: list[int] = []
    monkeypatch.setattr(draws, "resident", lambda data, *_: seen.append(len(data)))
    assert msd("distill", "mine.yaml").returncode == 0
    assert seen and set(seen) == {180}, "teacher, classifier and students draw from the rest alone"
    run = RunDir(mine / "runs/mine")
    found = json.loads((run.metrics / "fd_mine.json").read_text())
    assert "against 20 images held out of training" in found["protocol"]
    assert found["students_against"] == "held-out data"
    assert {row["reference"] for row in found["rows"] if row["group"] == "whole"} == {10, 20}
    context = EvaluationContext(run, FidOptions(), silent)
    assert (len(context.data), context.real().count) == (180, 20)
    choosing = EvaluationContext(run, FidOptions(), silent, choosing=True)
    assert choosing.real().count == 180 and "held out" not in choosing.metric.protocol.partition("), ")[2]


def test_plans_and_checks_say_it(mine: Path, msd: Msd) -> None:
    for words in (("distill", "mine.yaml", "--dry-run"), ("recipes", "validate", "mine.yaml")):
        assert "20 pictures are held out of training" in msd(*words).stdout
    assert "180 images of [1, 8, 8]" in msd("distill", "mine.yaml", "--dry-run").stdout
    assert "held_out" in msd("distill", "mine.yaml", "data.held_out=0.9", "--dry-run").stderr


def test_decoded_pictures_are_shared_and_what_is_made_of_them_is_not(mine: Path) -> None:
    run, recipe = RunDir(mine / "runs/mine"), load(mine / "mine.yaml", [f"data.path={mine}/mine"])
    other = load(mine / "mine.yaml", [f"data.path={mine}/mine", "data.held_out=null"])
    (train, held), (whole, same) = (dataset.provide_parts(run, r, silent) for r in (recipe, other))
    assert same is whole and (len(train), len(held), len(whole)) == (180, 20, 200)
    assert len(list(run.shared.glob("data-*/data.json"))) == 1
    assert teachers.teacher_key(recipe, train) != teachers.teacher_key(other, whole)


def test_a_new_recipe_holds_some_out_where_there_are_enough(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen, assumed = proposal._data(str(mine / "mine"))
    assert data.held_out is None and any("too few to spare" in line for line in assumed)
    monkeypatch.setattr(proposal, "FEWEST_HELD_OUT", 20)
    data, seen, assumed = proposal._data(str(mine / "mine"))
    assert data.held_out == 0.1 and seen.held_out == 20 and any("held_out" in line for line in assumed)
    monkeypatch.setattr(proposal, "MOST_HELD_OUT", 7)
    assert proposal._data(str(mine / "mine"))[0].held_out == 0.035
