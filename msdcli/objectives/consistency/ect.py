"""Easy consistency tuning (ECT, Geng et al. 2024, arXiv 2406.14548): no grid, steps that shrink while it trains.

In round k the lower end of a step is

    r(sigma) = max(0, sigma (1 - q^-(k+1) (1 + 8 sigmoid(-sigma)))),

and the student learns d(f(x, sigma), sg f(x_r, r)) / (sigma - r). In the first rounds r is 0 for most sigma and the
target is the image itself: the student is nearly a denoiser, and becomes a consistency model round by round.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from msdcli.diffusion import denoiser as d
from msdcli.diffusion.draws import Draws
from msdcli.diffusion.paths import layers_draws, path_end
from msdcli.objectives.base import Objective, Turn
from msdcli.recipe.stages import EctSettings


class EasyConsistencyTuning(Objective):
    """The same answer at both ends of a step, on a path of the teacher or of an image and its noise.

    Both evaluations have one dropout mask. With `huber_c` and the data's path this is iCT (arXiv 2310.14189) without
    its grid of noise levels.
    """

    def __init__(self, settings: EctSettings, student: d.Denoiser, teacher: d.Denoiser) -> None:
        self.settings = settings
        self.student = student
        self.teacher = teacher
        self.nets = {"student": student}
        self.decay = settings.decay(0)

    def turns(self, step: int) -> Iterator[Turn]:
        self.decay = self.settings.decay(step)
        yield ("student",), self.loss

    def loss(self, draws: Draws) -> Tensor:
        y, c = draws.real()
        n, sigma = draws.normal("noise"), self.draw_sigma(draws.uniform("sigma"))
        self.sigma, r = sigma, self.lower(sigma)
        x = y + d.per_image(sigma, y) * n
        repeat = layers_draws(x)
        with torch.no_grad():
            target = self.target(self.step_down(x, sigma, r, c, y, draws), r, c)
        repeat()
        error = d.consistency(self.student, x, sigma, c) - target
        return d.pseudo_huber(error, self.settings.huber_c * y[0].numel() ** 0.5) * self.weight(sigma, r)

    def draw_sigma(self, u: Tensor) -> Tensor:
        """Map uniform numbers to noise levels, up to the highest that the student is evaluated at."""
        span = (d.SIGMA_MIN, self.settings.sigmas[0])
        return d.truncated_lognormal(u, self.settings.P_mean, self.settings.P_std, span)

    def lower(self, sigma: Tensor) -> Tensor:
        """r(sigma), the lower end of a step in the round that it is."""
        return (sigma * (1 - self.decay * (1 + 8 * (-sigma).sigmoid()))).clamp(min=0)

    def step_down(self, x: Tensor, sigma: Tensor, r: Tensor, c: Tensor, y: Tensor, draws: Draws) -> Tensor:
        """Return x_r: less of the same noise on the image, or one Euler step down the teacher's ODE."""
        D = path_end(self.settings.path, self.teacher, x, sigma, c, y, draws)
        return D + d.per_image(r / sigma, x) * (x - D)

    def target(self, x_r: Tensor, r: Tensor, c: Tensor) -> Tensor:
        """f(x_r, r), which is x_r itself where no noise is left."""
        asked = torch.where(r > 0, r, torch.ones_like(r))  # ln(0) is no number
        return torch.where(d.per_image(r > 0, x_r), self.answer(x_r, asked, c), x_r)

    def answer(self, x: Tensor, sigma: Tensor, c: Tensor) -> Tensor:
        """f(x, sigma), where some noise is left."""
        return d.consistency(self.student, x, sigma, c)

    def weight(self, sigma: Tensor, r: Tensor) -> Tensor:
        """The weight of an image's distance."""
        if self.settings.weight == "step":
            return 1 / (sigma - r)
        by_c_out = d.edm_weight(sigma, self.teacher.sigma_data)  # 1 / c_out^2
        return by_c_out if self.settings.weight == "c_out^2" else by_c_out.sqrt()
