"""Continuous-time consistency models (sCM, Lu and Song 2024, arXiv 2410.11081), in sigma space and from a teacher.

No step at all: where f is consistent, its derivative along the teacher's path is zero. With the tangent g (see
`consistency_tangent`), normalised to g / (rms(g) + c), the loss

    ||(D - sg(D - c_out g)) / c_out||^2 / sigma

has the gradient of g . D / c_out. The paper's learnt weight of the noise levels is left out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from msdcli.diffusion import denoiser as d
from msdcli.diffusion.draws import Draws
from msdcli.diffusion.paths import consistency_tangent, derivative_along, layers_draws, path_end
from msdcli.objectives.base import Objective, Turn
from msdcli.recipe.stages import ScdSettings


class ContinuousConsistencyDistillation(Objective):
    """sCD on the teacher's path; with `path: data` sCT, on that of an image and its noise."""

    def __init__(self, settings: ScdSettings, student: d.Denoiser, teacher: d.Denoiser) -> None:
        self.settings = settings
        self.student = student
        self.teacher = teacher
        self.nets = {"student": student}
        self.warm = settings.warm(0)

    def turns(self, step: int) -> Iterator[Turn]:
        self.warm = self.settings.warm(step)
        yield ("student",), self.loss

    def loss(self, draws: Draws) -> Tensor:
        settings, sd = self.settings, self.teacher.sigma_data
        y, c = draws.real()
        span = (d.SIGMA_MIN, settings.sigmas[0])
        sigma = self.sigma = d.truncated_lognormal(draws.uniform("sigma"), settings.P_mean, settings.P_std, span)
        x = y + d.per_image(sigma, y) * draws.normal("noise")
        with torch.no_grad():
            D_ode = path_end(settings.path, self.teacher, x, sigma, c, y, draws)
        repeat = layers_draws(x)
        how, step = settings.derivative, settings.derivative_step
        dD = derivative_along(self.student, x, sigma, c, D_ode, how=how, step=step)
        repeat()
        D = self.student(x, sigma, c)
        g = consistency_tangent(D.detach(), D_ode, dD, sigma, sd, self.warm)
        g = g / (d.per_image(d.image_mean(g.square()).sqrt(), g) + settings.tangent_c)
        c_out = d.per_image(d.edm_weight(sigma, sd).rsqrt(), D)
        loss = d.image_mean(((D - (D - c_out * g).detach()) / c_out).square())
        return loss / sigma if settings.weight == "1/sigma" else loss
