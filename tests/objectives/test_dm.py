"""Distribution matching's gradient is that of the divergence it claims to minimise."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from msdcli.diffusion import denoiser as d
from msdcli.diffusion.draws import Draws, Source
from msdcli.objectives.dm import DistributionMatching
from msdcli.recipe.stages import DmSettings
from tests.gaussians import GaussianDenoiser, Shift

MEAN_P, VAR = torch.tensor([0.3, -0.2]), torch.tensor([0.25, 0.5])
MEAN_Q = torch.tensor([1.0, 0.4])


def kl_of_diffused(mean_q: Tensor, sigma: Tensor) -> Tensor:
    """KL(q_sigma || p_sigma) of Gaussians with equal variances, per noise level."""
    return ((mean_q - MEAN_P).square() / (VAR + sigma[:, None].square())).sum(1) / 2


@pytest.mark.parametrize("sigma", [0.05, 0.5, 5.0])
def test_gradient_is_that_of_the_kl_divergence(sigma: float) -> None:
    """With the exact fake denoiser, -(s_q - s_p) = dKL/dmean at every x; D_fake - D_teacher = sigma^2 (s_q - s_p)."""
    teacher, fake = GaussianDenoiser(MEAN_P, VAR), GaussianDenoiser(MEAN_Q, VAR)
    generator = torch.Generator().manual_seed(0)
    y = MEAN_Q + VAR.sqrt() * torch.randn(64, 2, generator=generator, dtype=torch.float64)
    level = torch.full((64,), sigma, dtype=torch.float64)
    x = y + sigma * torch.randn(64, 2, generator=generator, dtype=torch.float64)

    w = d.image_mean((y - teacher(x, level)).abs())
    g = d.matching_gradient(fake(x, level), teacher(x, level), y) * w[:, None] / sigma**2

    mean = MEAN_Q.double().requires_grad_()
    (wanted,) = torch.autograd.grad(kl_of_diffused(mean, level[:1]).sum(), mean)
    torch.testing.assert_close(g.detach(), wanted.expand_as(g), rtol=1e-6, atol=1e-6)


def test_surrogate_carries_the_gradient() -> None:
    y = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 3, 4, dtype=torch.float64)
    d.surrogate(y, g).sum().backward()
    torch.testing.assert_close(y.grad, g / 12)


class Points:
    """A data set of one class; distribution matching needs no image from it."""

    shape, class_names = (2,), ["all"]

    def __len__(self) -> int:
        return 4

    def images(self, numbers: list[int]) -> Tensor:
        return torch.zeros(len(numbers), 2)

    def labels(self, numbers: list[int]) -> Tensor:
        return torch.zeros(len(numbers), dtype=torch.int64)


@pytest.mark.parametrize("fake_batch", ["fresh", "shared"])
def test_alternating_turns_bring_the_student_to_the_teacher(fake_batch: str) -> None:
    """The fake network follows the student, and the student's mean moves to the teacher's, by the loop's own turns."""
    student = Shift(MEAN_Q, VAR)
    settings = DmSettings(pairs="none", sigma_span=[0.1, 0.7], fake_batch=fake_batch, batch=256)
    objective = DistributionMatching(settings, student, GaussianDenoiser(MEAN_P, VAR))
    optimizers = {
        "fake": torch.optim.SGD(objective.fake.parameters(), 0.05),
        "student": torch.optim.Adam(student.parameters(), 0.05),
    }
    source = Source(Points(), [0])
    for step in range(150):
        for turn, (names, loss) in enumerate(objective.turns(step)):
            loss(Draws(source, 256, ("test", step), turn)).mean().backward()
            for name in names:
                optimizers[name].step()
                optimizers[name].zero_grad()
    assert objective.nets["student"] is student
    torch.testing.assert_close(student.mean.detach(), MEAN_P.double(), atol=0.08, rtol=0)


def test_turns_are_the_papers_order() -> None:
    objective = DistributionMatching(DmSettings(fake_updates=3), Shift(MEAN_Q, VAR), GaussianDenoiser(MEAN_P, VAR))
    assert [names for names, _ in objective.turns(0)] == [("fake",)] * 3 + [("student",)]


def test_fake_weight_is_a_switch() -> None:
    draws = Draws(Source(Points(), [0]), 8, ("test",), 0)
    losses = {}
    for weight in ("dmd2", "none"):
        settings = DmSettings(fake_weight=weight, sigma_span=[0.4, 0.5])
        objective = DistributionMatching(settings, Shift(MEAN_Q, VAR), GaussianDenoiser(MEAN_P, VAR))
        losses[weight] = objective.fake_loss(draws)
    sigma = d.karras_draw(draws.uniform("sigma"), [0.4, 0.5])
    torch.testing.assert_close(losses["dmd2"], losses["none"] * (sigma**-2 + 4))


def test_pairs_filtered_keeps_to_the_students_part() -> None:
    class TwoClasses(Points):
        class_names: ClassVar = ["a", "b"]

        def labels(self, numbers: list[int]) -> Tensor:
            return torch.tensor([n % 2 for n in numbers])

    z, y, c = torch.randn(50, 2), torch.randn(50, 2), torch.arange(50) % 2
    source = Source(TwoClasses(), [1], pairs=(z, y, c))
    draws = Draws(source, 200, ("test",), 0)
    assert set(draws.pairs(True)[2].tolist()) == {1}
    assert set(draws.pairs(False)[2].tolist()) == {0, 1}
    assert len(draws.pairs(False, 7)[0]) == 7
    assert set(draws.labels("uniform").tolist()) == set(draws.labels("data").tolist()) == {1}
