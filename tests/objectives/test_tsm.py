"""Teacher score matching reaches the teacher where it can: on a linear-Gaussian case."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from msdcli import nets
from msdcli.diffusion.denoiser import per_image
from msdcli.diffusion.draws import Draws, Source
from msdcli.errors import UserError
from msdcli.objectives.tsm import TeacherScoreMatching
from msdcli.recipe.networks import MLPSettings
from msdcli.recipe.stages import TsmSettings
from tests.gaussians import GaussianDenoiser


class Linear(nn.Module):
    """D(x, sigma) = (v x + sigma^2 m) / (v + sigma^2) with m and ln v to be learned."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.log_variance = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        s2, v = per_image(sigma, x).square(), self.log_variance.exp()
        return (v * x + s2 * self.mean) / (v + s2)


class Cloud:
    """Points of the teacher's distribution, one class."""

    shape, class_names = (2,), ["all"]
    points = torch.tensor([0.3, -0.2]) + torch.tensor([0.5, 0.7]) * torch.randn(
        512, 2, generator=torch.Generator().manual_seed(0)
    )

    def __len__(self) -> int:
        return len(self.points)

    def images(self, numbers: list[int]) -> Tensor:
        return self.points[numbers]

    def labels(self, numbers: list[int]) -> Tensor:
        return torch.zeros(len(numbers), dtype=torch.int64)


def test_tsm_reaches_the_teacher() -> None:
    teacher = GaussianDenoiser(torch.tensor([0.3, -0.2]), torch.tensor([0.25, 0.49]))
    student = Linear()
    objective = TeacherScoreMatching(TsmSettings(), student, teacher)
    optimizer = torch.optim.Adam(student.parameters(), 0.05)
    source = Source(Cloud(), [0])
    for step in range(400):
        for names, loss in objective.turns(step):
            assert names == ("student",)
            loss(Draws(source, 128, ("test", step), 0)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(student.mean.detach(), teacher.mean.detach(), atol=1e-3, rtol=0)
    torch.testing.assert_close(student.log_variance.detach().exp(), teacher.variance, atol=1e-3, rtol=0)


class Scaled(GaussianDenoiser):
    """A teacher whose blocks give known features, all of them `by` times as large as another's."""

    taps = ("one", "two")  # type: ignore[assignment]
    by = 1.0

    def features(self, x: Tensor, sigma: Tensor, condition: Tensor | None, taps: Sequence[str]) -> list[Tensor]:
        return [self.by * (1000.0 if tap == "two" else 1.0) * (x + 1) for tap in taps]


def test_no_block_outweighs_another_in_the_loss_of_features() -> None:
    """Features that are 1 + e times the teacher's cost e^2, in whatever units a block computes."""
    teacher = Scaled(torch.tensor([0.3, -0.2]), torch.tensor([0.25, 0.49]))
    student = copy.deepcopy(teacher)
    student.by = 1.1
    objective = TeacherScoreMatching.__new__(TeacherScoreMatching)
    objective.student, objective.teacher, objective.taps = student, teacher, ["one", "two"]
    x, sigma = torch.randn(16, 2), torch.ones(16)
    loss = objective.feature_loss(x, sigma, torch.zeros(16, dtype=torch.int64))
    torch.testing.assert_close(loss, torch.full((16,), 0.01), rtol=1e-4, atol=0)


def test_students_of_fewer_blocks_learn_features_and_those_of_fewer_channels_are_refused() -> None:
    how = {"shape": (2,), "num_classes": 1, "sigma_data": 0.5}
    teacher = nets.build(MLPSettings(channels=8, blocks=3), **how)
    student = nets.build(MLPSettings(channels=8, blocks=2), **how)
    draws = Draws(Source(Cloud(), [0]), 16, ("test", 0), 0)
    objective = TeacherScoreMatching(TsmSettings(features=1.0), student, teacher)
    assert objective.taps == ["block0", "block1"]
    plain = TeacherScoreMatching(TsmSettings(), student, teacher).loss(draws)
    assert (objective.loss(draws) > plain).all()
    equal = TeacherScoreMatching(TsmSettings(features=1.0), copy.deepcopy(teacher), teacher).loss(draws)
    assert equal.max() < 1e-9
    narrow = nets.build(MLPSettings(channels=4, blocks=2), **how)
    with pytest.raises(UserError, match="block block0"):
        TeacherScoreMatching(TsmSettings(features=1.0), narrow, teacher)
