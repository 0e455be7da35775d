"""Teacher score matching: a student with another network learns the teacher's denoiser (arXiv 2410.23274).

    lambda(sigma) ||D(x, sigma, c) - D_teacher(x, sigma, c)||^2 + w mean_l ||f_l - f_l,teacher||^2 / ||f_l,teacher||^2

with the features f_l of the blocks that both have, which BK-SDM (arXiv 2305.15798) adds and LAPTOP-Diff (arXiv
2404.11098) divides by the teacher's, so that no block outweighs the others; w is 0 unless the recipe says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from msdcli.diffusion import denoiser as d
from msdcli.diffusion.draws import Draws
from msdcli.diffusion.guidance import drawn
from msdcli.errors import UserError
from msdcli.objectives.base import Objective, Turn
from msdcli.recipe.stages import TsmSettings


class TeacherScoreMatching(Objective):
    """lambda(sigma) ||D_student(x, sigma, c) - D_teacher(x, sigma, c)||^2 on noisy data of the student's part."""

    def __init__(self, settings: TsmSettings, student: d.Denoiser, teacher: d.Denoiser) -> None:
        self.settings = settings
        self.student = student
        self.teacher = teacher
        self.nets = {"student": student}
        self.taps = common_taps(student, teacher) if settings.features else []

    def turns(self, step: int) -> Iterator[Turn]:
        yield ("student",), self.loss

    def loss(self, draws: Draws) -> Tensor:
        y, c = draws.real()
        sigma = self.sigma = d.lognormal(draws.normal("sigma", ()), self.settings.P_mean, self.settings.P_std)
        x = y + d.per_image(sigma, y) * draws.normal("noise")
        with torch.no_grad():
            target = drawn(self.teacher, draws.uniform)(x, sigma, c)
        error = d.image_mean((self.student(x, sigma, c) - target).square())
        loss = d.edm_weight(sigma, self.teacher.sigma_data) * error
        return loss + self.settings.features * self.feature_loss(x, sigma, c) if self.taps else loss

    def feature_loss(self, x: Tensor, sigma: Tensor, c: Tensor) -> Tensor:
        """The features' squared distance from the teacher's, as a share of these, averaged over the blocks."""
        with torch.no_grad():
            theirs = [f.float() for f in self.teacher.features(x, sigma, c, self.taps)]
        mine = self.student.features(x, sigma, c, self.taps)
        shares = [
            d.image_mean((f - target).square()) / d.image_mean(target.square()).clamp(min=1e-12)
            for f, target in zip(mine, theirs, strict=True)
        ]
        return torch.stack(shares).mean(0)


def common_taps(student: d.Denoiser, teacher: d.Denoiser) -> list[str]:
    """Return the blocks that both have. UserError where there are none, or where their features differ in shape."""
    taps = [tap for tap in student.taps if tap in teacher.taps]
    if not taps:
        raise UserError("stage tsm: student and teacher have no block in common", hint="features: 0 in the stage")
    if student.reads_text:  # who asks without prompts?
        return taps
    device = next(student.parameters()).device
    x, sigma = torch.zeros(1, *student.shape, device=device), torch.ones(1, device=device)
    c = torch.zeros(1, dtype=torch.int64, device=device)
    with torch.no_grad():
        mine, theirs = (net.features(x, sigma, c, taps) for net in (student, teacher))
    for tap, f, target in zip(taps, mine, theirs, strict=True):
        if f.shape != target.shape:
            raise UserError(
                f"stage tsm: features of block {tap} are {[*f.shape[1:]]} in the student, {[*target.shape[1:]]} in the "
                "teacher, and their distance needs equal ones",
                hint="features: 0 in the stage, or a student of fewer blocks (student.depth) and not of fewer channels",
            )
    return taps
