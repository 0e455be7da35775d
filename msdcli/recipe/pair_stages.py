"""Stages that learn from the teacher's pairs of noise and image alone, without asking it again."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from msdcli.recipe.section import Fraction, Levels, Weight
from msdcli.recipe.stage_base import GeneratorSettings, PairsOf, StageSettings

Distance = Literal["l2", "huber"]


class PairedSettings(GeneratorSettings):
    """What the stages on pairs have in common."""

    sigmas: Levels = Field([80.0], max_length=1, description="noise level at which the student is evaluated")
    pairs: Literal["shared", "filtered"] = Field("shared", description="all pairs, or those of the student's part")

    @property
    def needs_images(self) -> bool:
        return False

    @property
    def pairs_used(self) -> PairsOf:
        return self.pairs

    @property
    def asks_teacher(self) -> bool:
        return False


class RegressSettings(PairedSettings):
    """Regression of one step on the teacher's pairs (Luhman and Luhman 2021, arXiv 2101.02388)."""

    objective: Literal["regress"] = Field("regress", description="regression on the teacher's pairs")
    distance: Distance = Field(
        "l2", description="of images: squared, or pseudo-Huber with c = 0.00054 times the numbers of an image"
    )
    flow_weight: Weight = Field(
        0.0,
        description="weight of a second loss, to agree with the `flow` that the stage before made, where that looks "
        "again at new samples (SlimFlow: 1)",
    )

    def check_after(self, before: StageSettings | None) -> None:
        if self.flow_weight and (before is None or before.objective != "flow"):
            raise ValueError("`flow_weight` asks the flow that the stage before made: put a stage `flow` before it")


class FlowSettings(PairedSettings):
    """Rectified flow on the teacher's pairs (reflow, arXiv 2209.03003; 2-RF++, 2405.20320; SlimFlow, 2407.12718)."""

    objective: Literal["flow"] = Field("flow", description="rectified flow on the teacher's pairs")
    sigmas: Levels = Field(
        [80.0],
        max_length=1,
        description="noise level at which the student is evaluated, and the highest that it learns: t = sigma / (1 + "
        "sigma), so that 80 stands for t = 1 as in EDM's networks",
    )
    distance: Distance = Field(
        "huber",
        description="of velocities: pseudo-Huber with c = 0.00054 times the numbers of an image (2-RF++), or squared",
    )
    t_slope: float = Field(
        4.0,
        ge=0,
        le=50,
        description="a of the density e^(a t) + e^(a (1 - t)) that t is drawn from: more at both ends (2-RF++: 4); "
        "0: uniform (SlimFlow)",
    )
    anneal: Fraction = Field(
        0.0,
        description="part of the steps over which the noise of a pair takes the place of fresh noise, linearly: the "
        "student begins as a denoiser and ends as a flow (SlimFlow: 0.375); 0: the pair's own from the first step",
    )
