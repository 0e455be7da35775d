"""Guidance of the fake network against classifier guidance: what the student feels where teacher and fake agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from msdcli.diffusion.denoiser import Denoiser, per_image
from msdcli.diffusion.draws import Batch, Draws
from msdcli.diffusion.guidance import Guided, drawn
from msdcli.objectives.dm import DistributionMatching
from msdcli.objectives.sid import ScoreIdentity
from msdcli.recipe.stages import DmSettings, SidSettings

MEANS = torch.tensor([[-0.7, 0.2], [0.6, -0.4]], dtype=torch.float64)  # of two classes, equally frequent
VARIANCE = 0.3


class TwoClasses(Denoiser):
    """The exact D(x, sigma, c) of class c ~ N(MEANS[c], VARIANCE), and of the mixture for no class; float64."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(1, 1), shape=(2,), num_classes=2)

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        assert condition is not None
        s2 = per_image(sigma, x).square()
        each = torch.stack([(VARIANCE * x + s2 * m) / (VARIANCE + s2) for m in MEANS], dim=1)  # [batch, class, 2]
        share = torch.where(
            condition[:, None] < 0, posterior(x, sigma), torch.nn.functional.one_hot(condition.clamp(min=0), 2)
        )
        return (share[..., None] * each).sum(1)


def posterior(x: Tensor, sigma: Tensor) -> Tensor:
    """p(c | x) [batch, class]."""
    squared = (x[:, None] - MEANS).square().sum(-1)
    return (-squared / (2 * (VARIANCE + sigma.square()))[:, None]).softmax(1)


def towards_the_class(x: Tensor, sigma: Tensor, c: Tensor) -> Tensor:
    """sigma^2 grad log p(c | x)."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(posterior(x, sigma).log().gather(1, c[:, None]).sum(), x)
    return per_image(sigma, x).square() * slope


def teacher(scale: float | tuple[float, float] | None) -> Denoiser:
    return TwoClasses() if scale is None else Guided(TwoClasses(), scale=scale, interval=(0.0, 100.0))


def draws(count: int = 12) -> Draws:
    torch.manual_seed(0)
    return Batch(torch.randn(count, 2, dtype=torch.float64), torch.arange(count) % 2)


def felt(objective: DistributionMatching, x: Tensor, sigma: Tensor, c: Tensor) -> Tensor:
    """D_fake - D_teacher as the student is shown them."""
    torch.manual_seed(1)
    fake = objective.guided_fake(draws())(x, sigma, c)
    torch.manual_seed(1)
    return fake - drawn(objective.teacher, draws().uniform)(x, sigma, c)


@pytest.mark.parametrize(
    ("scale", "how", "left"),
    [
        (None, "none", 0.0),
        (None, "same", 0.0),
        (None, "zero", -1.0),  # Zero-CFG
        (None, 0.0, -1.0),
        (None, -1.0, -2.0),  # Anti-CFG
        (2.0, "none", -1.0),
        (2.0, "same", 0.0),  # SiD-LSG: teacher and fake with one scale
        (2.0, 3.5, 1.5),
        ((1.5, 4.5), "same", 0.0),  # SNOOPI: a scale for every image, the same for both
    ],
)
def test_where_they_agree_the_student_feels_a_multiple_of_the_classifiers_gradient(
    scale: Any, how: Any, left: float
) -> None:
    """D_fake^k' - D_teacher^k = (k' - k) sigma^2 grad log p(c | x)."""
    objective = DistributionMatching(DmSettings(pairs="none", fake_guidance=how), TwoClasses(), teacher(scale))
    x, c = 2 * torch.randn(12, 2, dtype=torch.float64), torch.arange(12) % 2
    sigma = torch.linspace(0.1, 3, 12, dtype=torch.float64)
    torch.testing.assert_close(felt(objective, x, sigma, c), left * towards_the_class(x, sigma, c))


def test_it_is_what_sid_and_the_fakes_own_loss_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same guidance, and equal networks, sid's e is zero, and its loss with it; without, it is not."""
    for how, zero in (("same", True), ("none", False)):
        settings = SidSettings(fake_guidance=how, fake_guidance_trained=how == "same")  # type: ignore[arg-type]
        objective = ScoreIdentity(settings, TwoClasses(), teacher(2.0))
        given = draws()
        loss = objective.matching_loss(*given.real(), given)
        assert bool((loss.abs() < 1e-12).all()) is zero
        y, c = given.real()
        sigma = torch.ones(len(y), dtype=torch.float64)
        found = objective.denoising_loss(y, sigma, c, y, given)
        asked = (objective.teacher if zero else objective.fake)(y, sigma, c)
        torch.testing.assert_close(found, (asked - y).square().mean(1) * (1 + 4))


def test_the_fake_network_learns_some_samples_without_their_class() -> None:
    settings = DmSettings(pairs="none", fake_label_dropout=0.5)
    objective, seen = DistributionMatching(settings, TwoClasses(), teacher(None)), []
    objective.fake.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    y = torch.randn(400, 2, dtype=torch.float64)
    c = torch.arange(400) % 2
    objective.denoising_loss(y, torch.ones(400, dtype=torch.float64), c, y, Batch(y, c))
    assert 0.4 < (seen[0] < 0).double().mean() < 0.6 and torch.equal(seen[0].clamp(min=0), c * (seen[0] >= 0))


def test_a_guidance_that_is_trained_is_one() -> None:
    with pytest.raises(ValueError, match="fake_guidance_trained"):
        DmSettings(fake_guidance_trained=True)
    assert DmSettings(fake_guidance="same", fake_guidance_trained=True).fake_guidance_trained
