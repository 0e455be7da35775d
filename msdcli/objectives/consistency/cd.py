"""Consistency distillation (Song et al. 2023, arXiv 2303.01469)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from msdcli.diffusion import denoiser as d
from msdcli.diffusion.draws import Draws
from msdcli.diffusion.guidance import DenoiserCall, drawn
from msdcli.diffusion.paths import layers_draws
from msdcli.objectives.base import Objective, Turn
from msdcli.recipe.stages import CdSettings


class ConsistencyDistillation(Objective):
    """The student gives the same answer at both ends of one step along the teacher's ODE, so one step goes all the way.

    The target is the student itself without gradient (Song and Dhariwal 2023, arXiv 2310.14189, Section 3.2), the
    distance pseudo-Huber, the weight 1 / (sigma' - sigma) (their Section 3.3). EDM's preconditioning makes D(x, 0) = x;
    with an `anchor` f(x, anchor) = x, as in the authors' code, and the schedule begins there.
    """

    def __init__(self, settings: CdSettings, student: d.Denoiser, teacher: d.Denoiser) -> None:
        self.settings = settings
        self.student = student
        if settings.anchor:
            student.anchor = settings.anchor
        self.teacher = teacher
        self.nets = {"student": student}

    def turns(self, step: int) -> Iterator[Turn]:
        yield ("student",), self.loss

    def loss(self, draws: Draws) -> Tensor:
        y, c = draws.real()
        first = {"sigma_min": self.settings.anchor} if self.settings.anchor else {}
        schedule = d.ascending_sigmas(self.settings.levels, like=y, sigma_max=self.settings.sigmas[0], **first)
        index = (draws.uniform("level") * (len(schedule) - 1)).long()
        sigma, sigma_next = schedule[index + 1], schedule[index]
        self.sigma = sigma
        x = y + d.per_image(sigma, y) * draws.normal("noise")
        with torch.no_grad():
            teacher = drawn(self.teacher, draws.uniform)
            x_next = self.heun_step(teacher, x, sigma, sigma_next, c)
            repeat = layers_draws(x)
            target = d.consistency(self.student, x_next, sigma_next, c)
        repeat()
        error = d.consistency(self.student, x, sigma, c) - target
        return d.pseudo_huber(error, 0.00054 * y[0].numel() ** 0.5) / (sigma - sigma_next)

    def heun_step(self, teacher: DenoiserCall, x: Tensor, sigma: Tensor, sigma_next: Tensor, c: Tensor) -> Tensor:
        """Go one step down the teacher's probability-flow ODE (EDM's Algorithm 1)."""
        s, s_next = d.per_image(sigma, x), d.per_image(sigma_next, x)
        slope = (x - teacher(x, sigma, c)) / s
        x_next = x + (s_next - s) * slope
        slope_next = (x_next - teacher(x_next, sigma_next, c)) / s_next
        return x + (s_next - s) * 0.5 * (slope + slope_next)
