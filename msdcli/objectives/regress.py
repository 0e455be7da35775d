"""Knowledge distillation by regression on the teacher's samples (Luhman and Luhman 2021, arXiv 2101.02388)."""

from __future__ import annotations

from collections.abc import Iterator

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

    def turns(self, step: int) -> Iterator[Turn]:
        yield ("student",), self.loss

    def loss(self, draws: Draws) -> Tensor:
        z, y, c = draws.pairs(self.settings.pairs == "filtered")
        return d.distance(d.one_step(self.student, z, self.settings.sigmas[0], c) - y, self.settings.distance)
