"""Forgetting a class: the student learns another one in its place, and only its owner learns at all (SFD)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from msdcli.diffusion.draws import Draws, Source
from msdcli.objectives.dm import DistributionMatching
from msdcli.objectives.sid import ScoreIdentity
from msdcli.recipe import Recipe
from msdcli.recipe.stages import DmSettings, SidSettings
from tests.conftest import TINY, Msd
from tests.engine.train.test_distill import weights
from tests.gaussians import Shift
from tests.objectives.test_dm import Points
from tests.objectives.test_fake_guidance import MEANS, VARIANCE, TwoClasses

FORGET = "{objective: dm, steps: 4, batch: 16, fake_updates: 1, pairs: none, forget: {classes: [0]}}"


def forgetful(objective: type[DistributionMatching], settings: DmSettings) -> DistributionMatching:
    return objective(settings, Shift(MEANS[0], torch.full((2,), VARIANCE)), TwoClasses())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "settings"), [(DistributionMatching, DmSettings), (ScoreIdentity, SidSettings)], ids=["dm", "sid"]
)
def test_a_forgotten_class_is_matched_to_another_and_weighed(
    kind: type[DistributionMatching], settings: type[DmSettings]
) -> None:
    """Its loss is `weight` times that of a student whose teacher shows the other class; others are as they were."""
    own = Source(Points(), [0])
    draws = Draws(own, 16, ("test", 0), 0)
    y, c = torch.randn(16, 2, dtype=torch.float64), torch.arange(16) % 2
    plain = settings(pairs="none")
    forgetting = plain.model_copy(update={"forget": SidSettings(forget={"classes": [0], "instead": 1}).forget})
    losses = [forgetful(kind, s).matching_loss(y, c, draws) for s in (plain, forgetting)]
    taught = forgetful(kind, plain)
    taught.teacher.register_forward_pre_hook(lambda _, args: (args[0], args[1], torch.ones_like(args[2])))  # type: ignore[attr-defined]
    wanted = taught.matching_loss(y, c, draws)
    torch.testing.assert_close(losses[1][c == 1], losses[0][c == 1])
    torch.testing.assert_close(losses[1][c == 0], 0.01 * wanted[c == 0])


class Fake(torch.nn.Module):
    """The exact denoiser of the student's own Gaussian, as it is now."""

    def __init__(self, student: Shift) -> None:
        super().__init__()
        self.student = student

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        s2 = sigma.square()[:, None]
        return (VARIANCE * x + s2 * self.student.mean.detach()) / (VARIANCE + s2)


def test_training_reaches_the_mean_of_the_other_class() -> None:
    settings = DmSettings(pairs="none", sigma_span=[0.1, 0.7], forget={"classes": [0], "instead": 1, "weight": 1.0})
    objective = forgetful(DistributionMatching, settings)
    student = objective.nets["student"]
    objective.fake = Fake(student)  # type: ignore[assignment, arg-type]
    optimizer = torch.optim.Adam(student.parameters(), 0.05)
    for step in range(60):
        draws = Draws(Source(Points(), [0]), 64, ("test", step), 0)
        optimizer.zero_grad()
        objective.student_loss(draws).mean().backward()
        optimizer.step()
    torch.testing.assert_close(student.mean.detach(), MEANS[1], atol=0.08, rtol=0)


def test_any_kept_class_is_chosen_at_random() -> None:
    objective = forgetful(DistributionMatching, DmSettings(pairs="none", forget={"classes": [1, 4]}))
    objective.teacher.num_classes = 6
    c = torch.arange(400) % 6
    taught = objective.taught(c, Draws(Source(Points(), [0]), 400, ("test", 0), 0))
    forgotten = (c == 1) | (c == 4)
    assert torch.equal(taught[~forgotten], c[~forgotten])
    assert set(taught[forgotten].tolist()) == {0, 2, 3, 5}


def test_only_the_owner_of_the_class_is_trained_in_a_run_that_was_finished(
    finished: Path, msd: Msd, tmp_path: Path
) -> None:
    shutil.copytree(finished.parent, tmp_path / "runs")
    (tmp_path / "tiny.yaml").write_text(TINY.replace("evaluation:", f"  - {FORGET}\nevaluation:"))
    before = weights(tmp_path / "runs/tiny")
    done = msd("distill", "tiny.yaml")
    assert done.returncode == 0, done.stderr
    assert "student 1 dm: owns no class that this is about" in done.stderr
    after = weights(tmp_path / "runs/tiny")
    assert {key: after[key] for key in before} == before, "nothing that was there has changed"
    own, other = (after[f"students/{k}/1-dm/model.safetensors"] for k in (0, 1))
    assert other == before["students/1/0-dm/model.safetensors"]
    assert own != before["students/0/0-dm/model.safetensors"]
    record = json.loads((tmp_path / "runs/tiny/students/1/1-dm/model.json").read_text())
    assert record["handed_on"] and record["steps"] == 4 and record["cost"]["flops"] == 0
    assert msd("sample", "runs/tiny", "--classes", "0,7").returncode == 0
    for verb in ("status", "report"):
        assert msd(verb, "runs/tiny").returncode == 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"pairs": "shared"}, "must not see"),
        ({"objective": "adm", "pairs": "none"}, "must not see"),
        ({"sigmas": [2.5, 0.5]}, "same `sigmas`"),
        ({"forget": {"classes": [3], "instead": 3}}, "one of the classes to forget"),
    ],
)
def test_what_cannot_forget_is_refused_by_key(change: dict[str, object], why: str) -> None:
    stage = {"objective": "dm", "pairs": "none", "forget": {"classes": [3]}}
    stages = [{"objective": "dm"}, stage | change]
    with pytest.raises(ValueError, match=why):
        Recipe.model_validate({"name": "a", "data": {"name": "digits"}, "stages": stages})
    with pytest.raises(ValueError, match="continues a stage"):
        Recipe.model_validate({"name": "a", "data": {"name": "digits"}, "stages": [stage]})


def test_a_class_that_is_not_there_is_refused(tiny: Path, msd: Msd) -> None:
    tiny.write_text(TINY.replace("evaluation:", f"  - {FORGET.replace('[0]', '[99]')}\nevaluation:"))
    done = msd("distill", str(tiny))
    assert done.returncode == 2 and "forget names class 99" in done.stderr
