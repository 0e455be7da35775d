"""Consistency distillation on a Gaussian teacher, whose consistency function is known."""

import torch
from torch import Tensor, nn

from msdcli.diffusion.denoiser import per_image
from msdcli.diffusion.draws import Draws, Source
from msdcli.objectives.consistency.cd import ConsistencyDistillation
from msdcli.recipe.stages import CdSettings
from tests.gaussians import GaussianDenoiser
from tests.objectives.test_adm import REAL, VAR, Cloud


class Consistency(nn.Module):
    """f(x, sigma) = m + (x - m) sqrt(v / (v + sigma^2)), the ODE's end point, with m and ln v to be learned."""

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.mean = nn.Parameter(mean.double())
        self.log_variance = nn.Parameter(variance.double().log())

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        v, s2 = self.log_variance.exp(), per_image(sigma, x).square()
        return self.mean + (x - self.mean) * (v / (v + s2)).sqrt()


def loss_of(student: nn.Module, levels: int) -> float:
    objective = ConsistencyDistillation(
        CdSettings(levels=levels, sigma_init=10.0), student, GaussianDenoiser(REAL, VAR)
    )
    draws = Draws(Source(Cloud(), [0]), 4096, ("test",), 0)
    return objective.loss(draws).mean().item()


def test_the_true_consistency_function_has_no_loss_but_the_solvers() -> None:
    exact = [loss_of(Consistency(REAL, VAR), levels) for levels in (10, 20, 40)]
    assert exact[0] > 3 * exact[1] > 9 * exact[2]
    assert loss_of(Consistency(REAL + 0.3, VAR), 40) > 20 * exact[2]


def test_training_finds_it() -> None:
    student = Consistency(torch.zeros(2), torch.tensor([1.0, 0.1]))
    objective = ConsistencyDistillation(CdSettings(levels=40, sigma_init=10.0), student, GaussianDenoiser(REAL, VAR))
    optimizer = torch.optim.Adam(student.parameters(), 0.02)
    source = Source(Cloud(), [0])
    for step in range(500):
        for _, loss in objective.turns(step):
            loss(Draws(source, 256, ("test", step), 0)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(student.mean.detach(), REAL.double(), atol=0.05, rtol=0)
    torch.testing.assert_close(student.log_variance.detach().exp(), VAR.double(), atol=0.05, rtol=0)
