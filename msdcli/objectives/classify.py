"""Cross-entropy on real images: how the classifier that judges samples is trained."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional as F

from msdcli.diffusion.draws import Draws
from msdcli.nets.classifier import Classifier
from msdcli.objectives.base import Objective, Turn
from msdcli.recipe.stages import StageSettings


class Classification(Objective):
    """-log p(c | y), with a little label smoothing so that features keep telling good images apart."""

    def __init__(self, settings: StageSettings, student: Classifier, teacher: None = None) -> None:
        self.student = student
        self.nets = {"student": student}

    def turns(self, step: int) -> Iterator[Turn]:
        yield ("student",), self.loss

    def loss(self, draws: Draws) -> Tensor:
        y, c = draws.real()
        return F.cross_entropy(self.student(y), c, reduction="none", label_smoothing=0.05)
