"""Progressive distillation: one step ends where two do, and rounds are stages."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from msdcli.diffusion.denoiser import per_image
from msdcli.diffusion.draws import Draws, Source
from msdcli.objectives.progressive import ProgressiveDistillation, two_steps
from msdcli.recipe.stages import ProgressiveSettings, Stages, teacher_stage
from tests.gaussians import GaussianDenoiser, mixture
from tests.objectives.test_adm import REAL, VAR, Cloud


def test_one_step_with_the_target_ends_where_two_steps_do() -> None:
    x = 3 * torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma, middle, end = (torch.full((64,), s, dtype=torch.float64) for s in (3.0, 1.5, 0.4))
    Y = two_steps(mixture, x, sigma, middle, end, torch.zeros(64))
    s, m, e = (per_image(level, x) for level in (sigma, middle, end))
    x_m = x + (m - s) * (x - mixture(x, sigma)) / s
    x_e = x_m + (e - m) * (x_m - mixture(x_m, middle)) / m
    torch.testing.assert_close(x + (e - s) * (x - Y) / s, x_e, rtol=0, atol=1e-13)
    last = two_steps(mixture, x, sigma, middle, torch.zeros(64, dtype=torch.float64), torch.zeros(64))
    torch.testing.assert_close(last, mixture(x_m, middle), rtol=0, atol=1e-13)  # the ancestor's own answer


def objective(**keys: object) -> ProgressiveDistillation:
    student, teacher = GaussianDenoiser(REAL, VAR), GaussianDenoiser(REAL, VAR)
    return ProgressiveDistillation(ProgressiveSettings(**keys), student, teacher)  # type: ignore[arg-type]


def test_levels_are_nested_from_round_to_round() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    for intervals in (1, 2, 4):
        coarse, fine = objective(intervals=intervals).levels(like), objective(intervals=2 * intervals).levels(like)
        assert torch.equal(coarse, fine[::2]) and coarse[0] == 0 and (coarse.diff() > 0).all()
        assert coarse[-1].item() == pytest.approx(80.0)


def test_the_loss_is_the_truncated_snrs() -> None:
    """Of a Gaussian two Euler steps are affine: the student's distance from them is known."""
    goal = objective(intervals=2)
    draws = Draws(Source(Cloud(), [0]), 256, ("test", 0), 0)
    loss = goal.loss(draws)
    sigma = goal.sigma
    assert sigma is not None
    levels = goal.levels(sigma)
    place = torch.searchsorted(levels, sigma)
    assert set(place.tolist()) == {2, 4}, "every other level is the student's"
    y, _ = draws.real()
    x = y + per_image(sigma, y) * draws.normal("noise")

    def gain(level: Tensor) -> Tensor:
        return VAR.double() / (VAR.double() + per_image(level, y).double().square())

    s, m, e = (per_image(levels[place - k], y).double() for k in (0, 1, 2))
    two = (1 + (m - s) / s * (1 - gain(levels[place]))) * (1 + (e - m) / m * (1 - gain(levels[place - 1])))
    wanted = (two - e / s) / (1 - e / s)  # of x - mean
    error = ((wanted - gain(sigma)) * (x - REAL)).square().mean(1)
    torch.testing.assert_close(loss, (1 / sigma.double().square()).clamp(min=1) * error, rtol=1e-4, atol=1e-6)


def rounds(*stages: dict[str, object]) -> list[ProgressiveSettings]:
    return TypeAdapter(Stages).validate_python(list(stages))  # type: ignore[return-value]


def test_repeated_rounds_are_stages_that_teach_each_other() -> None:
    found = rounds({"objective": "progressive", "repeat": 4, "steps": 7})
    assert [(s.intervals, s.ancestor, s.repeat, s.steps) for s in found] == [
        *((8, "teacher", 1, 7), (4, "before", 1, 7), (2, "before", 1, 7), (1, "before", 1, 7)),
    ]
    assert rounds(*(s.model_dump(mode="json") for s in found)) == found, "as a run directory keeps them"
    assert ProgressiveDistillation(found[0], *[GaussianDenoiser(REAL, VAR)] * 2).frozen == ()
    assert ProgressiveDistillation(found[1], *[GaussianDenoiser(REAL, VAR)] * 2).frozen == ("ancestor",)


@pytest.mark.parametrize(
    ("stages", "problem"),
    [
        ([{"intervals": 4}], "stage 0, progressive: a student of 4 `intervals` has rounds to go"),
        ([{"intervals": 4}, {"ancestor": "before"}], "needs a progressive stage of 2 `intervals` before it"),
        ([{"ancestor": "before"}], "needs a progressive stage of 2 `intervals` before it"),
        ([{"repeat": 9}, {"repeat": 9}], "18 stages, counting every round"),
    ],
)
def test_rounds_that_lead_nowhere_are_refused(stages: list[dict[str, object]], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        rounds(*({"objective": "progressive"} | stage for stage in stages))


def test_the_newest_teacher_among_the_stages_before_teaches() -> None:
    stages = rounds({"objective": "tsm", "becomes": "teacher"}, {"objective": "tsm"}, {"objective": "dm"})
    assert [teacher_stage(stages, k) for k in range(3)] == [None, 0, 0]
    with pytest.raises(ValueError, match="`becomes: teacher` needs a stage after it"):
        rounds({"objective": "tsm", "becomes": "teacher"})
