"""Knowledge distillation by regression on the teacher's samples (Luhman and Luhman 2021, arXiv 2101.02388).

Guided by the flow of the stage before (SlimFlow, Zhu et al. 2024, arXiv 2407.12718), the student also agrees with a
second look at what it makes: with y = G(z, c) and sigma = t / (1 - t) the flow goes on from the student's own path,

    ||G(z, c) - sg D_flow(y + sigma z, sigma, c)||^2,  z fresh, t ~ U(0.2, 0.8).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from msdcli.diffusion import denoiser as d
from msdcli.diffusion.draws import Draws
from msdcli.objectives.base import Objective, Turn
from msdcli.recipe.stages import RegressSettings


class Regression(Objective):
    """||G(z, c) - y||^2 on pairs: the teacher's deterministic sampler took the noise z to y."""

    def __init__(self, settings: RegressSettings, student: d.Denoiser, teacher: d.Denoiser) -> None:
        self.settings = settings
        self.student = student
        self.nets = {"student": student}
        if settings.flow_weight:
            self.flow = copy.deepcopy(student)
            self.frozen = ("flow",)

    def turns(self, step: int) -> Iterator[Turn]:
        yield ("student",), self.loss

    def loss(self, draws: Draws) -> Tensor:
        z, y, c = draws.pairs(self.settings.pairs == "filtered")
        loss = d.distance(d.one_step(self.student, z, self.settings.sigmas[0], c) - y, self.settings.distance)
        return loss + self.settings.flow_weight * self.flow_loss(c, draws) if self.frozen else loss

    def flow_loss(self, c: Tensor, draws: Draws) -> Tensor:
        """The distance of new samples from where the flow ends that starts on their straight path to the noise."""
        z, t = draws.normal("z"), 0.2 + 0.6 * draws.uniform("t")
        y = d.one_step(self.student, z, self.settings.sigmas[0], c)
        sigma = self.sigma = t / (1 - t)
        with torch.no_grad():
            end = self.flow(y + d.per_image(sigma, y) * z, sigma, c)
        return d.distance(y - end, self.settings.distance)
