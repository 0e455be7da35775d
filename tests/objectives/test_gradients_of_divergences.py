"""What the objectives' own losses do to a student is the gradient of their divergences: from draws to the student.

`test_f_distill`, `test_sid` hold the formulas; here they go through the classes that train, by quadrature of Gaussians
and with an exact fake network and density ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor

from msdcli.diffusion import denoiser as d
from msdcli.diffusion.divergences import WEIGHTS
from msdcli.diffusion.draws import Draws
from msdcli.objectives.adm import AdversarialDistributionMatching
from msdcli.objectives.dm import DistributionMatching
from msdcli.objectives.sid import ScoreIdentity
from msdcli.recipe.stages import AdmSettings, DmSettings, SidSettings
from tests.objectives.test_ddo import Normal
from tests.objectives.test_sid import (
    BOTH,
    MEAN,
    NODES,
    STUDENT,
    VARIANCE,
    WEIGHT,
    WIDE,
    F,
    N,
    Z,
    close,
    differences,
    fisher,
    log_ratio,
)

NO_GAN = 1e-12  # of the objectives that must have heads: less than the tolerances see


class Line(Normal):
    """The exact denoiser of a normal distribution, with something to look at."""

    @property
    def taps(self) -> list[str]:
        return ["x"]

    def features(self, x: Tensor, sigma: Tensor, condition: Tensor | None, taps: Sequence[str]) -> list[Tensor]:
        return [x.float()]


class Made(Line):
    """The generator G(z) = m + sqrt(v) z of the numbers (m, v)."""

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.numbers[0] + self.numbers[1].sqrt() * x / d.per_image(sigma, x)


class Quadrature(Draws):
    """Nodes over (z, n) in the place of normal numbers; all noise levels are the middle of their span."""

    def __init__(self) -> None:
        self.part = (0, 1)

    def normal(self, purpose: str, shape: tuple[int, ...] | None = None) -> Tensor:
        return torch.zeros(len(Z), dtype=torch.float64) if shape == () else (Z if purpose == "z" else N)[:, None]

    def uniform(self, purpose: str) -> Tensor:
        return torch.full((len(Z),), 0.5, dtype=torch.float64)

    def labels(self, how: str) -> Tensor:
        return torch.zeros(len(Z), dtype=torch.int64)


def built(kind: Callable[..., Any], settings: DmSettings) -> Any:
    """An objective whose fake network and density ratio are the student's own, as it is now."""
    objective = kind(settings, Made(*STUDENT.tolist()), Line(MEAN.item(), VARIANCE.item()).requires_grad_(False))
    objective.fake = Line(*STUDENT.tolist()).requires_grad_(False)

    def exact(x: Tensor, sigma: Tensor, c: Tensor) -> Tensor:
        found = log_ratio(x, STUDENT, sigma[0].item())
        return found.flatten() if kind is AdversarialDistributionMatching else found

    if kind is not DistributionMatching:
        objective.logits = exact
    if objective.statistics is not None:
        objective.statistics.double()
    return objective


def gradient(objective: Any, *, times_w: bool) -> tuple[Tensor, float]:
    """The gradient of the student's mean loss by its two numbers, and the noise level."""
    draws = Quadrature()
    y, c = objective.generate(draws)
    loss = objective.matching_loss(y, c, draws)
    sigma = objective.sigma
    if times_w:
        loss = loss * d.distance_to_teacher(y, objective.teacher(y + d.per_image(sigma, y) * N[:, None], sigma, c))
    (BOTH * loss).sum().backward()
    assert loss.shape == Z.shape
    found: Tensor = objective.student.numbers.grad
    return found, sigma[0].item()


def divergence_of(name: str, s: float) -> Callable[[Tensor], Tensor]:
    def of(student: Tensor) -> Tensor:
        x = student[0] + (student[1] + s * s).sqrt() * NODES
        return (WEIGHT * F[name](log_ratio(x, student, s).exp())).sum()

    return of


@pytest.mark.parametrize("span", [[0.3, 0.301], [0.5, 0.501]])
def test_without_its_weight_dm_descends_the_reverse_kl(span: list[float]) -> None:
    """Diff-Instruct, VSD: E[(D_f - D_t) dy] = sigma^2 dKL(q_sigma || p_sigma)."""
    found, s = gradient(
        built(DistributionMatching, DmSettings(pairs="none", weight="none", sigma_span=span)), times_w=False
    )
    assert close(found, s**2 * differences(divergence_of("rkl", s), STUDENT), 1e-6)


@pytest.mark.parametrize("divergence", WEIGHTS)
def test_adm_descends_its_divergence(divergence: Any) -> None:
    """f-distill: the ratio of the heads, at the noise of the dm loss, weighs each image."""
    settings = AdmSettings(
        **{"pairs": "none", "weight": "none", "sigma_span": [0.4, 0.401], "ratio_clip": WIDE},  # type: ignore[arg-type]
        divergence=divergence,
        gan_weight=NO_GAN,
    )
    found, s = gradient(built(AdversarialDistributionMatching, settings), times_w=False)
    assert 0.5 < s < 2.5 and close(found, s**2 * differences(divergence_of(divergence, s), STUDENT), 1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_descends_the_fisher_divergence(alpha: float) -> None:
    found, s = gradient(built(ScoreIdentity, SidSettings(alpha=alpha, sigma_span=[0.3, 0.5])), times_w=True)
    frozen = differences(lambda a: fisher(a, s, density=STUDENT), STUDENT)
    whole = differences(lambda a: fisher(a, s), STUDENT)
    assert close(found, frozen / 2 + (1 - alpha) * (whole - frozen))


def test_sim_descends_its_distance() -> None:
    settings = SidSettings(distance="huber", huber_c=0.3, sigma_span=[0.3, 0.5])
    found, s = gradient(built(ScoreIdentity, settings), times_w=False)
    assert close(found, differences(lambda a: fisher(a, s, density=STUDENT, c=0.3), STUDENT), 1e-5)


@pytest.mark.parametrize("divergence", WEIGHTS)
def test_uni_instruct_descends_its_part_of_the_divergence(divergence: Any) -> None:
    """The exact form: half the gradient of E_q[h |e|^2], through the ratio."""
    settings = SidSettings(
        **{"divergence": divergence, "through_ratio": True, "gan_weight": NO_GAN},
        ratio_clip=WIDE,
        sigma_span=[0.3, 0.5],
    )
    found, s = gradient(built(ScoreIdentity, settings), times_w=True)
    assert close(found, differences(lambda a: fisher(a, s, weight=divergence), STUDENT) / 2, 1e-6)


def test_sida_without_its_gan_is_sid() -> None:
    """Both losses are a line in the weight of the GAN, and begin at SiD's."""

    def losses(weight: float) -> list[Tensor]:
        settings = SidSettings(gan_weight=weight, head_weight=weight, fake_updates=1)
        objective = built(ScoreIdentity, settings)
        objective.logits = lambda x, sigma, c: (x - 0.4).float()
        draws = Quadrature()
        draws.real = lambda: (N[:, None], draws.labels("data"))  # type: ignore[method-assign]
        return [objective.fake_loss(draws).detach(), objective.student_loss(draws).detach()]

    for none, one, two in zip(losses(0.0), losses(0.1), losses(0.2), strict=True):
        assert (one > none).all()
        torch.testing.assert_close(2 * one - two, none, rtol=1e-6, atol=1e-6)


class TwoLevels(d.Denoiser):
    """A student of two levels, a line at each: y = gain x + shift. Its samples are normal at either exit."""

    levels = (2.5, 0.5)

    def __init__(self) -> None:
        super().__init__(torch.nn.Identity(), shape=(1,), num_classes=1)
        self.gain, self.shift = (
            torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in ([0.1, 0.5], [0.0, 0.0])
        )

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        level = self.levels.index(round(sigma[0].item(), 6))
        return self.gain[level] * x + self.shift[level]

    def exits(self) -> list[tuple[Tensor, Tensor]]:
        """Mean and variance of what leaves each level."""
        first = self.shift[0], (self.gain[0] * self.levels[0]) ** 2
        again = self.gain[1] * first[0] + self.shift[1], self.gain[1] ** 2 * (first[1] + self.levels[1] ** 2)
        return [first, again]


class Mixture(torch.nn.Module):
    """The exact denoiser of what leaves a student, each exit as often as the other."""

    def __init__(self, student: TwoLevels) -> None:
        super().__init__()
        self.exits = student.exits

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        s2 = d.per_image(sigma, x).square()
        wide = [(m, v, v + s2) for m, v in self.exits()]
        share = torch.stack([-(x - m).square() / (2 * w) - w.log() / 2 for m, _, w in wide]).softmax(0)
        return (share * torch.stack([m + v / w * (x - m) for m, v, w in wide])).sum(0)


class TwoSteps(Quadrature):
    """Nodes over (z, the noise between the levels, n); both exits in turn, noise levels of their own."""

    nodes, weight = (torch.from_numpy(array) for array in hermegauss(6))
    grid: ClassVar = dict(
        zip(("z", "step 1", "noise"), torch.meshgrid(nodes, nodes, nodes, indexing="ij"), strict=True)
    )
    weights = torch.einsum("i,j,k->ijk", weight, weight, weight).flatten() / weight.sum() ** 3

    def __init__(self, step: int) -> None:
        self.part, self.step = (0, 1), step

    def normal(self, purpose: str, shape: tuple[int, ...] | None = None) -> Tensor:
        return self.grid[purpose].reshape(-1, 1)

    def uniform(self, purpose: str) -> Tensor:
        return torch.full((len(self.weights),), (self.step // 2 % 5) / 5, dtype=torch.float64)

    def labels(self, how: str) -> Tensor:
        return torch.zeros(len(self.weights), dtype=torch.int64)

    def one_of(self, purpose: str, count: int) -> int:
        return self.step % count


def test_a_linear_two_step_student_reaches_the_teacher_at_both_exits() -> None:
    """Backward simulation under the exact score of the mixture of both exits."""
    student, teacher = TwoLevels(), Line(0.3, 0.25).requires_grad_(False)
    settings = DmSettings(pairs="none", sigmas=list(TwoLevels.levels), weight="none", sigma_span=[0.2, 0.4])
    objective = DistributionMatching(settings, student, teacher)
    objective.fake = Mixture(student)  # type: ignore[assignment]
    optimizer = torch.optim.Adam(student.parameters(), lr=0.03)
    steps = 300
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / steps)
        optimizer.zero_grad()
        (TwoSteps.weights * objective.student_loss(TwoSteps(step))).sum().backward()
        optimizer.step()
    exits = student.exits()
    mean = sum(m for m, _ in exits) / 2
    variance = sum(v + (m - mean) ** 2 for m, v in exits) / 2
    assert (mean.item(), variance.item()) == pytest.approx((0.3, 0.25), abs=0.005), "of both together"
    for m, v in exits:  # two that lie apart by e differ from the teacher by e^4: the last of it goes slowly
        assert m.item() == pytest.approx(0.3, abs=0.07) and v.item() == pytest.approx(0.25, abs=0.02)
