"""Progressive distillation (Salimans and Ho 2022, arXiv 2202.00512), in sigma space.

A round has a student of N steps on noise levels s_N > .. > s_1 > s_0 = 0. From x at s = s_i an ancestor, the teacher or
the student of the round before, takes two steps of its ODE (DDIM, Euler in sigma) by a level m to e = s_(i-1):

    x_m = x + (m - s) (x - A(x, s)) / s,    x_e = x_m + (e - m) (x_m - A(x_m, m)) / m,

and the student learns the answer with which one step ends at the same place:

    Y = (x_e - e/s x) / (1 - e/s),    max(1, s^-2) ||D(x, s) - Y||^2    (their "truncated SNR").

The rounds of one recipe are stages with N = 2^k, .., 2, 1; the levels, of Karras' spacing, are nested.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from msdcli.diffusion import denoiser as d
from msdcli.diffusion.draws import Draws
from msdcli.diffusion.guidance import DenoiserCall, drawn
from msdcli.objectives.base import Objective, Turn
from msdcli.recipe.stages import ProgressiveSettings


class ProgressiveDistillation(Objective):
    """One step of the student ends where two steps of its ancestor do."""

    def __init__(self, settings: ProgressiveSettings, student: d.Denoiser, teacher: d.Denoiser) -> None:
        self.settings = settings
        self.student = student
        if settings.ancestor == "before":
            self.ancestor = copy.deepcopy(student)
            self.frozen = ("ancestor",)
        else:
            self.ancestor = self.teacher = teacher
        self.nets = {"student": student}

    def turns(self, step: int) -> Iterator[Turn]:
        yield ("student",), self.loss

    def loss(self, draws: Draws) -> Tensor:
        y, c = draws.real()
        levels = self.levels(y)
        place = 2 * (draws.uniform("level") * self.settings.intervals).long()
        sigma, middle, end = levels[place + 2], levels[place + 1], levels[place]
        self.sigma = sigma
        x = y + d.per_image(sigma, y) * draws.normal("noise")
        with torch.no_grad():
            target = two_steps(drawn(self.ancestor, draws.uniform), x, sigma, middle, end, c)
        error = d.image_mean((self.student(x, sigma, c) - target).square())
        return sigma.pow(-2).clamp(min=1) * error

    def levels(self, like: Tensor) -> Tensor:
        """Return the ancestor's noise levels, ascending from 0; every other one is the student's."""
        count = 2 * self.settings.intervals
        place = torch.arange(count + 1, device=like.device, dtype=like.dtype) / count
        levels = d.continuous_karras(place, [0.0, 1.0], sigma_max=self.settings.sigmas[0])
        return levels * (place > 0)


def two_steps(ask: DenoiserCall, x: Tensor, sigma: Tensor, middle: Tensor, end: Tensor, c: Tensor | None) -> Tensor:
    """Return the Y with which one step from `sigma` to `end` ends where two steps of `ask`, by `middle`, do."""
    s, m, e = (d.per_image(level, x) for level in (sigma, middle, end))
    x_m = x + (m - s) / s * (x - ask(x, sigma, c))
    x_e = x_m + (e - m) / m * (x_m - ask(x_m, middle, c))
    return (x_e - e / s * x) / (1 - e / s)
