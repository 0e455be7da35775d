"""Score identity distillation's gradients are those of the divergences that they claim, by quadrature of Gaussians."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor

from msdcli.diffusion.denoiser import continuous_karras
from msdcli.diffusion.divergences import SECOND, WEIGHTS
from msdcli.objectives.sid import identity_loss
from msdcli.recipe.stages import SidSettings

# Data N(MEAN, VARIANCE) and the student G(z) = m + sqrt(v) z, in one dimension and float64.
MEAN, VARIANCE = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
STUDENT = torch.tensor([0.8, 0.45], dtype=torch.float64)
NODES, WEIGHT = (torch.from_numpy(array) for array in hermegauss(60))
WEIGHT = WEIGHT / WEIGHT.sum()
Z, N = (grid.flatten() for grid in torch.meshgrid(NODES, NODES, indexing="ij"))
BOTH = (WEIGHT[:, None] * WEIGHT[None]).flatten()
SIGMAS = [0.3, 1.0, 3.0]
# f of the divergences, f'' r^2 = h.
F: dict[str, Callable[[Tensor], Tensor]] = {
    "rkl": lambda r: -r.log(),
    "kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "hellinger": lambda r: 2 * (1 - r.sqrt()),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "softened_rkl": lambda r: (1 + r) * ((1 + r) / (2 * r)).log(),
    "neyman": lambda r: (1 - r).square() / (2 * r),
}


def log_normal(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * (x - mean) ** 2 / variance - 0.5 * (2 * math.pi * variance).log()


def denoised(x: Tensor, mean: Tensor, variance: Tensor, s: float) -> Tensor:
    return (variance * x + s * s * mean) / (variance + s * s)


def log_ratio(x: Tensor, student: Tensor, s: float) -> Tensor:
    """ln p_t / q at x."""
    return log_normal(x, MEAN, VARIANCE + s * s) - log_normal(x, student[0], student[1] + s * s)


def differences(function: Callable[[Tensor], Tensor], at: Tensor, h: float = 1e-5) -> Tensor:
    """Central differences of a function of the student's two numbers."""
    steps = torch.eye(2, dtype=torch.float64) * h
    return torch.stack([(function(at + step) - function(at - step)) / (2 * h) for step in steps])


def fisher(
    student: Tensor, s: float, *, density: Tensor | None = None, weight: str | None = None, c: float = 0
) -> Tensor:
    """E_q[h |D_f - D_t|^2], or of its pseudo-Huber distance where c > 0; `density` freezes q."""
    a = student if density is None else density
    x = a[0] + (a[1] + s * s).sqrt() * NODES
    e = denoised(x, student[0], student[1], s) - denoised(x, MEAN, VARIANCE, s)
    value = (e**2 + c * c).sqrt() if c else e**2
    if weight is not None:
        value = value * WEIGHTS[weight](log_ratio(x, student, s).exp())
    return (WEIGHT * value).sum()


def gradient(settings: SidSettings, s: float) -> Tensor:
    """The gradient of the loss by the student's numbers, the fake network being exact and frozen; without 1/w."""
    student = STUDENT.clone().requires_grad_()
    y = student[0] + student[1].sqrt() * Z
    x = y + s * N
    D_t, D_f = denoised(x, MEAN, VARIANCE, s), denoised(x, STUDENT[0], STUDENT[1], s)
    logit = log_ratio(x, STUDENT, s)[:, None]
    w = (y - D_t).abs().detach().clamp(min=1e-5)
    loss = identity_loss(y[:, None], D_t[:, None], D_f[:, None], settings, logit)
    (BOTH * loss * (1.0 if settings.distance == "huber" else w)).sum().backward()
    assert student.grad is not None
    return student.grad


def close(a: Tensor, b: Tensor, tolerance: float = 1e-7) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


@pytest.mark.parametrize("s", SIGMAS)
def test_alpha_says_whose_gradient_it_is(s: float) -> None:
    frozen = differences(lambda a: fisher(a, s, density=STUDENT), STUDENT)
    whole = differences(lambda a: fisher(a, s), STUDENT)
    assert close(gradient(SidSettings(alpha=1.0), s), frozen / 2)
    assert close(gradient(SidSettings(alpha=0.5), s), whole / 2)
    assert close(gradient(SidSettings(alpha=1.2), s), frozen / 2 - 0.2 * (whole - frozen))


@pytest.mark.parametrize("s", SIGMAS)
def test_the_huber_distance_is_sims(s: float) -> None:
    wanted = differences(lambda a: fisher(a, s, density=STUDENT, c=0.3), STUDENT)
    assert close(gradient(SidSettings(distance="huber", huber_c=0.3), s), wanted, 1e-5)


WIDE = [1e-4, 1e4]


@pytest.mark.parametrize("s", SIGMAS)
@pytest.mark.parametrize("divergence", F)
def test_the_exact_form_of_a_divergence(divergence: str, s: float) -> None:
    settings = SidSettings(divergence=divergence, through_ratio=True, gan_weight=1.0, ratio_clip=WIDE)  # type: ignore[arg-type]
    wanted = differences(lambda a: fisher(a, s, weight=divergence), STUDENT) / 2
    assert close(gradient(settings, s), wanted, 1e-6)


@pytest.mark.parametrize(("s", "off"), [(0.3, 0.35), (1.0, 0.18), (3.0, 0.03)])
def test_the_papers_form_of_kl_is_near_the_theorem(s: float, off: float) -> None:
    """A frozen ratio is off by 35 %, 18 % and 3 %, and points the same way."""
    found = gradient(SidSettings(divergence="kl", gan_weight=1.0, ratio_clip=WIDE), s)
    wanted = differences(lambda a: fisher(a, s, weight="kl"), STUDENT) / 2
    assert (found - wanted).abs().max() / wanted.abs().max() == pytest.approx(off, abs=0.02)
    assert torch.cosine_similarity(found, wanted, dim=0) > 0.97


@pytest.mark.parametrize("divergence", F)
def test_divergences_expand_along_the_noise(divergence: str) -> None:
    """D_f(p_0 || q_0) = integral sigma E_q[h |s_t - s_f|^2] dsigma + D_f at the end."""

    def of(s: float) -> Tensor:
        x = STUDENT[0] + (STUDENT[1] + s * s).sqrt() * NODES
        return (WEIGHT * F[divergence](log_ratio(x, STUDENT, s).exp())).sum()

    levels = torch.linspace(0, math.log(201), 4001, dtype=torch.float64).exp() - 1
    inside = [s * fisher(STUDENT, s, weight=divergence) / s**4 if s > 0 else torch.zeros(()) for s in levels.tolist()]
    integral = torch.trapezoid(torch.stack([i.double() for i in inside]), levels)
    assert integral.item() == pytest.approx((of(0.0) - of(200.0)).item(), rel=5e-6)


@pytest.mark.parametrize("divergence", WEIGHTS)
def test_the_second_weight_is_the_first_ones(divergence: str) -> None:
    """A = h - r h'."""
    r = torch.linspace(0.1, 5, 50, dtype=torch.float64, requires_grad=True)
    h = WEIGHTS[divergence](r)
    slope = torch.autograd.grad(h.sum() + 0 * r.sum(), r)[0]
    torch.testing.assert_close(SECOND[divergence](r), h - r * slope)


def test_the_loss_is_linear_in_alpha() -> None:
    torch.manual_seed(0)
    y, D_t, D_f = torch.randn(3, 4, 2, 3, 3)
    a, b, c = (identity_loss(y, D_t, D_f, SidSettings(alpha=alpha)) for alpha in (0.5, 1.0, 1.5))
    torch.testing.assert_close(a + c, 2 * b)


def test_the_schedule_is_sids() -> None:
    """Its lowest 80 % end at 24.4, 60 % at 5.8."""
    ends = continuous_karras(torch.tensor([0.0, 1.0]), [0.0, 0.8])
    assert ends.tolist() == pytest.approx([0.002, 24.4], rel=2e-3)
    assert continuous_karras(torch.tensor([1.0]), [0.0, 0.6]).item() == pytest.approx(5.8, rel=1e-2)


def test_a_divergence_without_a_discriminator_is_refused() -> None:
    with pytest.raises(ValueError, match="through_ratio"):
        SidSettings(through_ratio=True)
    with pytest.raises(ValueError, match="gan_weight"):
        SidSettings(divergence="kl")
    assert not SidSettings().needs_images and SidSettings(gan_weight=1e-4).needs_images


@pytest.mark.parametrize("keys", [{"distance": "huber"}, {"through_ratio": True, "gan_weight": 1.0}])
def test_an_alpha_that_is_not_read_is_refused(keys: dict[str, Any]) -> None:
    SidSettings(**keys)
    with pytest.raises(ValueError, match="which has no `alpha`"):
        SidSettings(alpha=0.5, **keys)
    with pytest.raises(ValueError, match="leave `distance` at l2"):
        SidSettings(distance="huber", through_ratio=True, gan_weight=1.0)


def test_the_loss_is_divided_by_the_distance_or_by_nothing() -> None:
    """Without the weight (`none`) the loss is that with it times mean|y - D_t|."""
    y, D_t, D_f = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logit = y[:, :1]
    for settings in (
        SidSettings(),
        SidSettings(alpha=0.5),
        SidSettings(divergence="kl", gan_weight=1.0),
        SidSettings(divergence="kl", gan_weight=1.0, through_ratio=True),
    ):
        plain = settings.model_copy(update={"weight": "none"})
        by, alone = (identity_loss(y, D_t, D_f, s, logit) for s in (settings, plain))
        torch.testing.assert_close(alone, by * (y - D_t).abs().mean(1))
    for said, keys in (("its own norm", {"distance": "huber", "weight": "none"}), ("is of", {"fake_span": [0.0, 1.0]})):
        with pytest.raises(ValueError, match=said):
            SidSettings.model_validate(keys).check_anew(None)
