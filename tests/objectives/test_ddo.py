"""Direct discriminative optimization: its gradient where it begins, and where it goes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from msdcli.diffusion.denoiser import Denoiser, edm_weight, per_image
from msdcli.diffusion.draws import Draws
from msdcli.objectives.ddo import DirectDiscriminativeOptimization
from msdcli.recipe.stages import DdoSettings
from tests.objectives.test_sid import BOTH, MEAN, STUDENT, VARIANCE, N, Z


class Normal(Denoiser):
    """The exact D(x, sigma) of N(mean, variance) on the line, both learnt; float64."""

    def __init__(self, mean: float, variance: float) -> None:
        super().__init__(torch.nn.Identity(), shape=(1,), num_classes=1)
        self.numbers = torch.nn.Parameter(torch.tensor([mean, variance], dtype=torch.float64))

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        mean, variance = self.numbers
        s2 = per_image(sigma, x).square()
        return (variance * x + s2 * mean) / (variance + s2)


class Nodes(Draws):
    """Draws that are the nodes of a quadrature over (z, n): data N(MEAN, VARIANCE), the reference's N(STUDENT)."""

    def __init__(self) -> None:
        self.part = (0, 1)

    def normal(self, purpose: str, shape: tuple[int, ...] | None = None) -> Tensor:
        return torch.zeros(len(N), dtype=torch.float64) if shape == () else N[:, None]

    def real(self) -> tuple[Tensor, Tensor]:
        return (MEAN + VARIANCE.sqrt() * Z)[:, None], torch.zeros(len(Z), dtype=torch.int64)

    def pairs(self, only_part: bool, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return Z[:, None], (STUDENT[0] + STUDENT[1].sqrt() * Z)[:, None], torch.zeros(len(Z), dtype=torch.int64)


@pytest.mark.parametrize("s", [0.3, 1.0])
def test_it_begins_with_half_of_betas_denoising_and_whatever_alpha(s: float) -> None:
    """At D = D_ref, exact on the reference's samples: beta / 2 times the denoising loss's gradient on the data."""
    found = {}
    for alpha in (0.0, 1.0, 7.0):
        model, reference = Normal(*STUDENT.tolist()), Normal(*STUDENT.tolist())
        settings = DdoSettings(P_mean=math.log(s), beta=0.1, alpha=alpha)
        loss = DirectDiscriminativeOptimization(settings, model, reference).loss(Nodes())
        (found[alpha],) = torch.autograd.grad((BOTH * loss).sum(), model.numbers)
    y, c = Nodes().real()
    sigma = torch.full((len(y),), s, dtype=torch.float64)
    denoising = edm_weight(sigma, 0.5) * (model(y + s * N[:, None], sigma, c) - y).square().mean(1)
    (wanted,) = torch.autograd.grad((BOTH * denoising).sum() * 0.1 / 2, model.numbers)
    for gradient in found.values():
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-10)


def test_it_goes_on_to_the_data() -> None:
    """Gradient descent from the reference, with a large beta: the model moves from its samples towards the data."""
    model = Normal(*STUDENT.tolist())
    reference = Normal(*STUDENT.tolist()).requires_grad_(False)
    settings = DdoSettings(P_mean=0.0, beta=2.0)
    objective = DirectDiscriminativeOptimization(settings, model, reference)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    before = (model.numbers.detach() - torch.stack([MEAN, VARIANCE])).abs()
    for _ in range(25):
        optimizer.zero_grad()
        (BOTH * objective.loss(Nodes())).sum().backward()
        optimizer.step()
    after = (model.numbers.detach() - torch.stack([MEAN, VARIANCE])).abs()
    assert (after < before).all() and torch.equal(reference.numbers, STUDENT)
