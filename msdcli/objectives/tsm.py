"""Teacher score matching: a student with another network learns the teacher's denoiser (arXiv 2410.23274)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from msdcli.diffusion import denoiser as d
from msdcli.diffusion.draws import Draws
from msdcli.diffusion.guidance import drawn
from msdcli.objectives.base import Objective, Turn
from msdcli.recipe.stages import TsmSettings


class TeacherScoreMatching(Objective):
    """lambda(sigma) ||D_student(x, sigma, c) - D_teacher(x, sigma, c)||^2 on noisy data of the student's part."""

    def __init__(self, settings: TsmSettings, student: d.Denoiser, teacher: d.Denoiser) -> None:
        self.settings = settings
        self.student = student
        self.teacher = teacher
        self.nets = {"student": student}

    def turns(self, step: int) -> Iterator[Turn]:
        yield ("student",), self.loss

    def loss(self, draws: Draws) -> Tensor:
        y, c = draws.real()
        sigma = self.sigma = d.lognormal(draws.normal("sigma", ()), self.settings.P_mean, self.settings.P_std)
        x = y + d.per_image(sigma, y) * draws.normal("noise")
        with torch.no_grad():
            target = drawn(self.teacher, draws.uniform)(x, sigma, c)
        error = d.image_mean((self.student(x, sigma, c) - target).square())
        return d.edm_weight(sigma, self.teacher.sigma_data) * error
