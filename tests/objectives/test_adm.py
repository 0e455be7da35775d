"""Adversarial distribution matching: the heads learn the density ratio, from the features they are told to use."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from msdcli import nets
from msdcli.diffusion import denoiser as d
from msdcli.diffusion.draws import Draws, Source
from msdcli.errors import UserError
from msdcli.objectives.adm import AdversarialDistributionMatching
from msdcli.recipe.networks import UNetSettings
from msdcli.recipe.stages import AdmSettings
from tests.gaussians import GaussianDenoiser, Shift

REAL, GENERATED, VAR = torch.tensor([0.5, 0.0]), torch.tensor([-0.3, 0.4]), torch.tensor([0.25, 0.25])


class Seeing(GaussianDenoiser):
    """A denoiser whose only feature is what it is shown."""

    taps: ClassVar = ["input"]

    def features(self, x: Tensor, sigma: Tensor, condition: Tensor | None, taps: list[str]) -> list[Tensor]:
        assert taps == ["input"]
        return [torch.cat([x, torch.ones_like(x), -x, x.square()], dim=1)]


class Cloud:
    """Real images: N(REAL, VAR), one class."""

    shape, class_names = (2,), ("all",)
    points = (REAL + VAR.sqrt() * torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))).double()

    def __len__(self) -> int:
        return len(self.points)

    def images(self, numbers: list[int]) -> Tensor:
        return self.points[numbers]

    def labels(self, numbers: list[int]) -> Tensor:
        return torch.zeros(len(numbers), dtype=torch.int64)


def test_the_discriminator_approaches_the_true_log_ratio() -> None:
    """At its optimum the logit is log p_real(x) / p_generated(x), both diffused by the same noise."""
    torch.manual_seed(0)
    settings = AdmSettings(features="teacher", pairs="none", head_weight=1.0, gan_span=[0.4, 0.401])
    objective = AdversarialDistributionMatching(settings, Shift(GENERATED, VAR), Seeing(REAL, VAR))
    objective.head.double()
    source, optimizer = Source(Cloud(), [0]), torch.optim.Adam(objective.head.parameters(), 5e-3)
    for step in range(600):
        objective._batches = {}
        objective.fake_loss(Draws(source, 512, ("test", step), 0)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    sigma = d.karras_draw(torch.zeros(1), settings.gan_span).double()
    x = (REAL + GENERATED).double() / 2 + 0.6 * torch.randn(500, 2, generator=torch.Generator().manual_seed(1)).double()
    variance = (VAR + sigma**2).double()
    wanted = ((x - GENERATED).square() / variance - (x - REAL).square() / variance).sum(1) / 2
    logit = objective.logits(x, sigma.expand(500), torch.zeros(500, dtype=torch.int64)).detach()
    assert (logit - wanted).abs().mean() < 0.1 * wanted.abs().mean()


def unet_goal(**keys: object) -> AdversarialDistributionMatching:
    torch.manual_seed(0)
    teacher, student = (
        nets.build(UNetSettings(channels=c, embedding=8), shape=(1, 8, 8), num_classes=10, sigma_data=0.5)
        for c in (8, 4)
    )
    for p in [*teacher.parameters(), *student.parameters()]:
        torch.nn.init.normal_(p, std=0.1)
    settings = AdmSettings(pairs="none", gan_weight=1.0, head_weight=1.0, **keys)  # type: ignore[arg-type]
    return AdversarialDistributionMatching(settings, student, teacher.requires_grad_(False))


class Pictures(Cloud):
    shape, class_names = (1, 8, 8), tuple("0123456789")
    pictures = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 40

    def images(self, numbers: list[int]) -> Tensor:
        return self.pictures[numbers]

    def labels(self, numbers: list[int]) -> Tensor:
        return torch.tensor([n % 10 for n in numbers])


@pytest.mark.parametrize("gan_noise", ["own", "shared"])
@pytest.mark.parametrize(("features", "encoder_learns"), [("fake", True), ("teacher", False)])
def test_both_published_forms_train_what_they_say(features: str, encoder_learns: bool, gan_noise: str) -> None:
    objective = unet_goal(features=features, gan_noise=gan_noise, taps=["8x8_0", "middle"])
    assert len(objective.head.heads) == 2
    draws = Draws(Source(Pictures(), [3, 4]), 6, ("test",), 0)
    objective.fake.requires_grad_(True)  # as the loop does when it is the fake network's turn
    _, c = objective.fake_batch(draws)
    y_real, _ = draws.real()
    logit = objective.logits(*objective.see(y_real, draws, "real"), c)
    (-logit).mean().backward()
    encoder = [p.grad for p in objective.fake.net.encoder.parameters()]
    assert any(g is not None and g.abs().sum() > 0 for g in encoder) == encoder_learns
    assert all(p.grad is not None for p in objective.head.parameters())
    assert all(p.grad is None for p in objective.teacher.parameters())

    objective.student.zero_grad()
    loss = objective.student_loss(draws)
    assert loss.shape == (6,)
    without = unet_goal(features=features, gan_noise=gan_noise, taps=["8x8_0", "middle"])
    without.settings = objective.settings.model_copy(update={"gan_weight": 0.0})
    assert not torch.equal(loss, without.student_loss(draws)), "the GAN term is part of the student's loss"


def test_real_images_are_of_the_students_part_only() -> None:
    source = Source(Pictures(), [3, 4])
    assert set(Draws(source, 200, ("test",), 0).real()[1].tolist()) == {3, 4}


def test_unknown_taps_are_refused_before_training() -> None:
    with pytest.raises(UserError, match="no encoder block is called 'block3'; there are 8x8_0, 4x4_down"):
        unet_goal(taps=["block3"])


def test_turns_train_fake_and_heads_together() -> None:
    assert [names for names, _ in unet_goal(fake_updates=2).turns(0)] == [("fake", "head")] * 2 + [("student",)]


def test_the_weight_of_dm_is_not_that_of_the_pairs() -> None:
    """What is left of the loss as dm's weight goes to 0 is what 0 leaves: the regression with its own weight."""
    pairs = tuple(torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    source = Source(Pictures(), range(10), pairs=(*pairs, torch.arange(50) % 10))
    found = []
    for weight in (0.0, 1e-9, 0.5, 1.0):
        objective = unet_goal(dm_weight=weight)
        objective.settings = objective.settings.model_copy(update={"pairs": "shared", "gan_weight": 0.0})
        found.append(objective.student_loss(Draws(source, 8, ("test",), 0)).mean().item())
    none, least, half, whole = found
    assert none > 0 and least == pytest.approx(none, rel=1e-4)
    assert half - none == pytest.approx((whole - none) / 2, rel=1e-4)
