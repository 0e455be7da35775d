"""Rectified flow and regression on the pairs of a Gaussian, whose optima are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from msdcli.diffusion.denoiser import distance, per_image
from msdcli.diffusion.draws import Draws, Source
from msdcli.objectives.flow import RectifiedFlow, ends_more_often
from msdcli.objectives.regress import Regression
from msdcli.recipe.stages import FlowSettings, RegressSettings
from tests.gaussians import GaussianDenoiser, Shift
from tests.objectives.test_adm import REAL, VAR, Cloud

COUNT = 50_000


def gaussian_source(count: int = COUNT) -> Source:
    """Pairs of a Gaussian teacher: its ODE takes the unit noise z to y = m + s z."""
    z = torch.randn(count, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pairs = (z, REAL.double() + VAR.double().sqrt() * z, torch.zeros(count, dtype=torch.int64))
    return Source(Cloud(), [0], pairs=pairs)


class Gain(nn.Module):
    """D(x, sigma) = m + (1 + e) k(sigma) (x - m), k of the flow that is annealed to b; e to be varied."""

    def __init__(self, b: float) -> None:
        super().__init__()
        self.b, self.e = b, 0.0

    def gain(self, sigma: Tensor) -> Tensor:
        s = VAR.double().sqrt()
        q = s + sigma * math.sqrt(1 - self.b**2)
        return s * q / (q.square() + (sigma * self.b).square())

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        return REAL.double() + (1 + self.e) * self.gain(per_image(sigma, x)) * (x - REAL.double())


def minimiser(b_student: float, b_noise: float) -> float:
    """The e that minimises the flow loss at sigma = 1, a parabola in e, where the noise is annealed to `b_noise`."""
    student = Gain(b_student)
    objective = RectifiedFlow(FlowSettings(distance="l2"), student, GaussianDenoiser(REAL, VAR))
    objective.fresh = b_noise
    objective.draw_t = lambda u: torch.full_like(u, 0.5)  # type: ignore[method-assign]
    losses = []
    for student.e in (-1.0, 0.0, 1.0):
        losses.append(objective.loss(Draws(gaussian_source(), COUNT, ("test", 0), 0)).mean().item())
    low, middle, high = losses
    return (low - high) / (2 * (low + high - 2 * middle))


@pytest.mark.parametrize("b", [0.0, 0.6, 1.0])
def test_the_optimum_of_an_annealed_flow(b: float) -> None:
    """Gain s q / (q^2 + sigma^2 b^2), q = s + sigma sqrt(1 - b^2): from the denoiser (b = 1) to the straight flow."""
    assert abs(minimiser(b, b)) < 1e-2
    assert abs(minimiser(1.0 if b < 1 else 0.0, b)) > 0.1, "another b has another optimum"


def test_its_ends_are_the_denoiser_and_the_straight_path() -> None:
    sigma = torch.tensor([[0.1], [1.0], [10.0]], dtype=torch.float64)
    s = VAR.double().sqrt()
    torch.testing.assert_close(Gain(1.0).gain(sigma), VAR / (VAR + sigma**2))
    torch.testing.assert_close(Gain(0.0).gain(sigma), s / (s + sigma))
    objective = RectifiedFlow(FlowSettings(), Gain(0.0), GaussianDenoiser(REAL, VAR))
    assert objective.loss(Draws(gaussian_source(512), 512, ("test", 0), 0)).max() < 1e-12, "a straight flow has no loss"


def test_the_loss_is_that_of_velocities() -> None:
    """|v - (z - y)|^2 of rectified flow's own variables: x_t = (1 - t) y + t z, v = (x_t - D) / t."""
    student, draws = Gain(1.0), Draws(gaussian_source(64), 64, ("test", 0), 0)
    for kind in ("l2", "huber"):
        objective = RectifiedFlow(FlowSettings(distance=kind), student, GaussianDenoiser(REAL, VAR))
        loss = objective.loss(draws)
        z, y, _ = draws.pairs(False)
        assert objective.sigma is not None
        t = per_image(objective.sigma / (1 + objective.sigma), y)
        x_t = (1 - t) * y + t * z
        v = (x_t - student(x_t / (1 - t), objective.sigma)) / t
        expected = (v - (z - y)).square().sum(1)
        if kind == "huber":
            expected = (expected + (0.00054 * 2) ** 2).sqrt() - 0.00054 * 2
        torch.testing.assert_close(loss, expected / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("slope", [0.0, 1.0, 4.0, 8.0])
def test_t_has_the_published_density(slope: float) -> None:
    """2-RF++ mixes a e^(a t) / (e^a - 1) with its mirror image."""
    u = torch.linspace(0, 1, 4001, dtype=torch.float64)
    t = ends_more_often(u, slope)
    middle = (t[1:] + t[:-1]) / 2
    rising = torch.ones_like(middle) if slope == 0 else slope * (slope * middle).exp() / math.expm1(slope)
    published = (rising + rising.flip(0)) / 2  # u is symmetric, and so is t
    torch.testing.assert_close((u[1:] - u[:-1]) / (t[1:] - t[:-1]), published, rtol=2e-3, atol=0)
    assert t[0].abs() < 1e-12 and (t[-1] - 1).abs() < 1e-12


def test_t_lies_within_the_levels_that_networks_know() -> None:
    objective = RectifiedFlow(FlowSettings(), Gain(0.0), GaussianDenoiser(REAL, VAR))
    t = objective.draw_t(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(t / (1 - t), torch.tensor([0.002, 80.0], dtype=torch.float64))


def test_annealing_depends_on_the_step_alone() -> None:
    settings = FlowSettings(anneal=0.5, steps=8)
    objective = RectifiedFlow(settings, Gain(0.0), GaussianDenoiser(REAL, VAR))
    assert [objective.fresh_noise(step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    list(objective.turns(3))
    assert objective.fresh == 0.25
    never = RectifiedFlow(FlowSettings(steps=8), Gain(0.0), GaussianDenoiser(REAL, VAR))
    assert never.fresh_noise(0) == 0


@pytest.mark.parametrize("kind", ["l2", "huber"])
def test_regression_finds_the_teachers_map(kind: str) -> None:
    student = Shift(REAL, VAR)
    settings = RegressSettings(distance=kind, sigma_init=2.5)
    objective = Regression(settings, student, GaussianDenoiser(REAL, VAR))
    draws = Draws(gaussian_source(512), 512, ("test", 0), 0)
    assert objective.loss(draws).max() < 1e-12
    student.mean.data += 0.1
    loss = objective.loss(draws)
    expected = 0.01 if kind == "l2" else (math.sqrt(0.02 + (0.00054 * 2) ** 2) - 0.00054 * 2) / 2
    torch.testing.assert_close(loss, torch.full_like(loss, expected))
    loss.mean().backward()
    assert (student.mean.grad > 0).all()


def test_pseudo_huber_is_the_square_of_small_errors_and_the_norm_of_large_ones() -> None:
    error = torch.tensor([[3e-6, 4e-6], [300.0, 400.0]], dtype=torch.float64)
    small, large = distance(error, "huber").tolist()
    assert small == pytest.approx(25e-12 / (2 * 0.00108) / 2, rel=1e-4)
    assert large == pytest.approx(250.0, rel=1e-5)


class Made(nn.Module):
    """A generator that is off by `shift`, and as a denoiser the straight flow."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift, dtype=torch.float64))

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.shift + Gain(0.0)(x, sigma) if (sigma < 100).all() else self.shift + REAL + VAR.sqrt() * x / 200


def test_a_flow_looks_again_at_what_the_student_makes() -> None:
    """A student that is off by e meets a target that is off by e s / (s + sigma); e sigma / (s + sigma) is left."""
    draws = Draws(gaussian_source(512), 512, ("test", 0), 0)
    for shift in (0.0, 0.1):
        student = Made(shift)
        objective = Regression(RegressSettings(sigma_init=200.0, flow_weight=3.0), student, GaussianDenoiser(REAL, VAR))
        assert objective.frozen == ("flow",)
        objective.flow.shift.data.zero_()
        loss = objective.loss(draws)
        sigma = objective.sigma
        assert sigma is not None and sigma.min() > 0.2 / 0.8 and sigma.max() < 0.8 / 0.2
        left = (
            (shift * per_image(sigma, VAR[None]) / (VAR.double().sqrt() + per_image(sigma, VAR[None]))).square().mean(1)
        )
        torch.testing.assert_close(loss, shift**2 + 3.0 * left, rtol=1e-4, atol=1e-9)
        loss.mean().backward()
        assert objective.flow.shift.grad is None, "the flow does not learn"
