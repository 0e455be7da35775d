"""Truncated consistency models (TCM, Lee et al. 2024, arXiv 2410.14895): the second stage of a consistency model."""

from __future__ import annotations

import copy
import math
from functools import lru_cache

import torch
from torch import Tensor

from msdcli.diffusion import denoiser as d
from msdcli.diffusion.draws import Draws
from msdcli.objectives.consistency.ect import EasyConsistencyTuning
from msdcli.recipe.stages import TcmSettings


class TruncatedConsistency(EasyConsistencyTuning):
    """Consistency at noise levels from `boundary` up alone; below it, targets come from the stage before, frozen.

    A part of the images sits at the boundary, where every target is the frozen network's: without it the student could
    agree with itself on anything. Which images these are is drawn image by image, and the weights of both losses are
    those of their means, so that nothing depends on how a batch is cut.
    """

    def __init__(self, settings: TcmSettings, student: d.Denoiser, teacher: d.Denoiser) -> None:
        super().__init__(settings, student, teacher)
        self.truncation = settings
        self.first = copy.deepcopy(student)
        self.frozen = ("first",)

    def loss(self, draws: Draws) -> Tensor:
        part = self.truncation.boundary_part
        at_boundary = draws.uniform("sigma") < part
        return super().loss(draws) * torch.where(at_boundary, self.truncation.boundary_weight / part, 1 / (1 - part))

    def draw_sigma(self, u: Tensor) -> Tensor:
        """The boundary for the lowest numbers; for the others ln(sigma) of Student's t, cut to what is above it."""
        given = self.truncation
        part, low, high = given.boundary_part, math.log(given.boundary), math.log(given.sigmas[0])
        table = inverse_of_t(given.P_mean, given.P_std, given.P_df, low, high, u.device)
        place = ((u - part) / (1 - part)).clamp(0, 1) * (len(table) - 1)
        below = place.long().clamp(max=len(table) - 2)
        above = torch.lerp(table[below], table[below + 1], place - below).exp()
        return torch.where(u < part, torch.full_like(u, given.boundary), above.to(u.dtype))

    def answer(self, x: Tensor, sigma: Tensor, c: Tensor) -> Tensor:
        """f(x, sigma) of the student from the boundary up, of the frozen network below it."""
        boundary = self.truncation.boundary
        own = super().answer(x, sigma.clamp(min=boundary), c)
        below = d.consistency(self.first, x, sigma, c)
        return torch.where(d.per_image(sigma >= boundary, x), own, below)


@lru_cache(maxsize=8)
def inverse_of_t(
    mean: float,
    scale: float,
    df: float,
    low: float,
    high: float,
    device: torch.device | str = "cpu",
    *,
    num: int = 8193,
) -> Tensor:
    """Return where the distribution of Student's t, cut to [low, high], reaches 0, 1 / (num - 1), .. 1 (float32).

    It is copied to the device once, not in every step.
    """
    import numpy as np
    from scipy.integrate import cumulative_trapezoid

    # A fine grid that is denser where the density has its peak: `sinh` of equal steps, in units of the peak's width.
    width = scale * math.sqrt(min(df, 1.0))
    grid = mean + width * np.sinh(np.linspace(math.asinh((low - mean) / width), math.asinh((high - mean) / width), num))
    density = (1 + ((grid - mean) / scale) ** 2 / df) ** (-(df + 1) / 2)
    mass = cumulative_trapezoid(density, grid, initial=0)
    return torch.tensor(np.interp(np.linspace(0, mass[-1], num), mass, grid), dtype=torch.float32, device=device)
