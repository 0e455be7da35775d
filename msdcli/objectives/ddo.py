"""Direct discriminative optimization (Zheng et al. 2025, arXiv 2503.01103): a diffusion model as its own discriminator.

With l(y) = -beta lambda(sigma) (|D(x) - y|^2 - |D_ref(x) - y|^2), the estimate of log p / p_ref at y by one noise
level, the model minimises -log sigmoid(l(data)) - alpha log sigmoid(-l(samples of the reference)). At D = D_ref the
gradient is beta / 2 times that of denoising score matching on the data: on its own samples the reference is at rest.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn.functional import softplus

from msdcli.diffusion import denoiser as d
from msdcli.diffusion.draws import Draws
from msdcli.diffusion.guidance import NO_CLASS
from msdcli.objectives.base import Objective, Turn
from msdcli.recipe.stages import DdoSettings


class DirectDiscriminativeOptimization(Objective):
    """`student` is the model that learns, `teacher` the frozen reference; the pairs are the reference's samples."""

    def __init__(self, settings: DdoSettings, student: d.Denoiser, teacher: d.Denoiser) -> None:
        self.settings = settings
        self.student = student
        self.reference = teacher
        self.nets = {"student": student}

    def turns(self, step: int) -> Iterator[Turn]:
        yield ("student",), self.loss

    def loss(self, draws: Draws) -> Tensor:
        data = self.log_ratio(*draws.real(), "data", draws)
        _, y, c = draws.pairs(False)
        samples = self.log_ratio(y, c, "reference", draws)
        separated = (samples < data).detach().float()
        self.health = {"discriminator_accuracy": separated.mean}
        return softplus(-data) + self.settings.alpha * softplus(samples)

    def log_ratio(self, y: Tensor, c: Tensor, whose: str, draws: Draws) -> Tensor:
        """l(y) of each image; both networks see the same x and sigma."""
        if self.settings.label_dropout:
            c = c.masked_fill(draws.uniform(f"label dropout {whose}") < self.settings.label_dropout, NO_CLASS)
        normal = draws.normal(f"sigma {whose}", ())
        sigma = self.sigma = d.lognormal(normal, self.settings.P_mean, self.settings.P_std)
        x = y + d.per_image(sigma, y) * draws.normal(f"noise {whose}")
        error, reference = (d.image_mean((net(x, sigma, c) - y).square()) for net in (self.student, self.reference))
        return -self.settings.beta * d.edm_weight(sigma, self.student.sigma_data) * (error - reference.detach())
