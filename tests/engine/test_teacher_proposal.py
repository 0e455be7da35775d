"""A recipe for a teacher that is there: its files say what is to be made, and the recipe is a good one."""

from __future__ import annotations

from pathlib import Path

import pytest

from msdcli.engine import timing
from msdcli.recipe import load
from tests.conftest import Msd

pytest.importorskip("diffusers")

from tests.latent_teacher import latent_pipeline, picture_folder
from tests.text_teacher import prompts, sd_pipeline


@pytest.fixture(autouse=True)
def device_of_known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "stage_seconds", lambda *arguments: arguments[3].flops / 1e11)
    monkeypatch.setattr(timing, "evaluation_rate", lambda *_: 1e11)
    monkeypatch.setattr(timing, "classifier_seconds", lambda *_: 5.0)


def test_a_latent_teacher_gets_a_recipe_with_pictures_or_without(msd: Msd, tmp_path: Path) -> None:
    latent_pipeline(tmp_path / "dit")
    refused = msd("recipes", "new", "dit")
    assert refused.returncode == 2 and "try: msd recipes new --teacher dit" in refused.stderr
    done = msd("recipes", "new", "--teacher", "dit", "--minutes", "0.1")
    assert done.returncode == 0, done.stderr
    assert "dit makes [3, 8, 8], from latents of [4, 4, 4], knows 4 classes" in done.stdout
    bare = load("dit.yaml")
    assert bare.data.name == "none" and not bare.needs_pairs and bare.partition.students == 4
    assert bare.stages[0].steps < 5000 and bare.teacher.solver.sigma_max == pytest.approx(157.4, abs=0.1)
    assert "msd fid runs/dit PICTURES --protocol clean" in Path("dit.yaml").read_text()
    picture_folder(tmp_path / "pictures")
    done = msd("recipes", "new", "pictures", "seen.yaml", "--teacher", "dit")
    assert done.returncode == 0, done.stderr
    assert load("seen.yaml").data.size == 8 and load("seen.yaml").has_measure  # type: ignore[union-attr]
    (tmp_path / "pictures" / "doe").rename(tmp_path / "doe")
    assert (
        "has 3 classes, the teacher at dit 4" in msd("recipes", "new", "pictures", "x.yaml", "--teacher", "dit").stderr
    )
    assert not Path("x.yaml").exists()


def test_a_teacher_of_text_wants_prompts(msd: Msd, tmp_path: Path) -> None:
    sd_pipeline(tmp_path / "sd")
    assert "try: msd recipes new prompts.txt --teacher sd" in msd("recipes", "new", "--teacher", "sd").stderr
    (tmp_path / "prompts.txt").write_text("\n".join(prompts(8)))
    done = msd("recipes", "new", "prompts.txt", "sd.yaml", "--teacher", "sd", "--students", "2")
    assert done.returncode == 0, done.stderr
    made = load("sd.yaml")
    assert made.has_prompts and made.partition.method == "kmeans" and made.teacher.guidance is not None


def test_a_teacher_of_msd_is_held_to_pairs(finished: Path, msd: Msd) -> None:
    done = msd("recipes", "new", "mine.yaml", "--teacher", str(finished / "teacher"), "--students", "3")
    assert done.returncode == 0, done.stderr
    made = load("mine.yaml")
    assert made.needs_pairs and made.partition.students == 3 and made.stages[0].sigmas == [2.5]  # type: ignore[union-attr]
