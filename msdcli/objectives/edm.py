"""Denoising score matching: how a teacher is trained (Karras et al. 2022, arXiv 2206.00364)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from msdcli.diffusion import denoiser as d
from msdcli.diffusion.draws import Draws
from msdcli.diffusion.guidance import NO_CLASS
from msdcli.objectives.base import Objective, Turn
from msdcli.recipe.stages import EdmSettings


class DenoisingScoreMatching(Objective):
    """lambda(sigma) ||D(y + sigma n, sigma, c) - y||^2 on the data, sigma lognormal (Eq. 8 and Table 1)."""

    def __init__(self, settings: EdmSettings, student: d.Denoiser, teacher: d.Denoiser | None) -> None:
        self.settings = settings
        self.student = student
        self.nets = {"student": student}

    def turns(self, step: int) -> Iterator[Turn]:
        yield ("student",), self.loss

    def loss(self, draws: Draws) -> Tensor:
        y, c = draws.real()
        if self.settings.label_dropout:
            c = c.masked_fill(draws.uniform("label dropout") < self.settings.label_dropout, NO_CLASS)
        sigma = self.sigma = d.lognormal(draws.normal("sigma", ()), self.settings.P_mean, self.settings.P_std)
        x = y + d.per_image(sigma, y) * draws.normal("noise")
        error = d.image_mean((self.student(x, sigma, c) - y).square())
        return d.edm_weight(sigma, self.student.sigma_data) * error
