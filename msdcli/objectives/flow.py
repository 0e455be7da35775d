"""Rectified flow on the teacher's pairs, in sigma space.

A flow (Liu et al. 2022, arXiv 2209.03003) is a velocity v(x_t, t) of x_t = (1 - t) y + t z, whose target is z - y. With
sigma = t / (1 - t) and x = x_t / (1 - t) = y + sigma z it is v = (x_t - D(x, sigma)) / t, so that

    ||v - (z - y)||^2 = ||D(x, sigma) - y||^2 / t^2:

the same network as ever, a weight, and the noise of the pair in the place of fresh noise. 2-RF++ (Lee et al. 2024,
arXiv 2405.20320) draws t more often near both ends and takes a pseudo-Huber distance; SlimFlow (Zhu et al. 2024, arXiv
2407.12718) goes from fresh noise to the pair's while it trains, z' = sqrt(1 - b^2) z + b n, b from 1 to 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from msdcli.diffusion import denoiser as d
from msdcli.diffusion.draws import Draws
from msdcli.objectives.base import Objective, Turn
from msdcli.recipe.stages import FlowSettings


class RectifiedFlow(Objective):
    """distance((D(y + sigma z', sigma, c) - y) / t) on pairs (z, y): straight paths from the noise to its image."""

    def __init__(self, settings: FlowSettings, student: d.Denoiser, teacher: d.Denoiser) -> None:
        self.settings = settings
        self.student = student
        self.nets = {"student": student}
        self.fresh = 0.0

    def turns(self, step: int) -> Iterator[Turn]:
        self.fresh = self.fresh_noise(step)
        yield ("student",), self.loss

    def fresh_noise(self, step: int) -> float:
        """b, the part of the noise that is not the pair's."""
        annealed = self.settings.anneal * self.settings.steps
        return max(0.0, 1 - step / annealed) if annealed else 0.0

    def loss(self, draws: Draws) -> Tensor:
        z, y, c = draws.pairs(self.settings.pairs == "filtered")
        if b := self.fresh:
            z = (1 - b**2) ** 0.5 * z + b * draws.normal("noise")
        t = self.draw_t(draws.uniform("t"))
        sigma = self.sigma = t / (1 - t)
        error = self.student(y + d.per_image(sigma, y) * z, sigma, c) - y
        return d.distance(error / d.per_image(t, y), self.settings.distance)

    def draw_t(self, u: Tensor) -> Tensor:
        """Map uniform numbers `u` in [0, 1) to t, from the lowest noise level to the student's own."""
        low, high = (sigma / (1 + sigma) for sigma in (d.SIGMA_MIN, self.settings.sigmas[0]))
        return low + (high - low) * ends_more_often(u, self.settings.t_slope)


def ends_more_often(u: Tensor, slope: float) -> Tensor:
    """Map uniform numbers `u` to t in [0, 1) of density p(t) ~ e^(a t) + e^(a (1 - t)) (2-RF++).

    Its distribution function is 1/2 + sinh(a (t - 1/2)) / (2 sinh(a/2)), whose inverse this is.
    """
    if slope == 0:
        return u
    return 0.5 + ((2 * u - 1) * math.sinh(slope / 2)).asinh() / slope
