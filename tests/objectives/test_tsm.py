"""Teacher score matching reaches the teacher where it can: on a linear-Gaussian case."""

import torch
from torch import Tensor, nn

from msdcli.diffusion.denoiser import per_image
from msdcli.diffusion.draws import Draws, Source
from msdcli.objectives.tsm import TeacherScoreMatching
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
