"""Stages whose students take several of the teacher's steps in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field

from msdcli.recipe.section import Fraction, Levels
from msdcli.recipe.stage_base import GeneratorSettings, StageSettings


class ProgressiveSettings(GeneratorSettings):
    """Progressive distillation: two steps become one, round after round (Salimans and Ho 2022, arXiv 2202.00512)."""

    objective: Literal["progressive"] = Field("progressive", description="progressive distillation")
    sigmas: Levels = Field([80.0], max_length=1, description="noise level at which the student's steps begin")
    repeat: int = Field(
        1,
        ge=1,
        le=12,
        description="rounds, each a stage of so many `steps`: students of 2^(repeat - 1), .., 4, 2 and 1 steps, each "
        "taught by the one before",
    )
    intervals: int = Field(
        1, ge=1, le=4096, description="steps that the student takes to noise level 0; of the last round, with `repeat`"
    )
    ancestor: Literal["teacher", "before"] = Field(
        "teacher",
        description="who takes two steps where the student takes one: the teacher, or what the stage before made (in "
        "all rounds of `repeat` but the first)",
    )
    lr_hold: Fraction = Field(0.0, description="part of the steps at full learning rate; then linear to `lr_end`")
    lr_end: Fraction = Field(0.0, description="last learning rate of a round, as a part of the first")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="decay of the average that a round ends with; 0: its last weights, as published"
    )

    @property
    def asks_teacher(self) -> bool:
        return self.ancestor == "teacher"

    def expanded(self) -> Sequence[Self]:
        last = self.repeat - 1
        return [
            self.model_copy(
                update={
                    "repeat": 1,
                    "intervals": self.intervals * 2 ** (last - k),
                    "ancestor": "before" if k else self.ancestor,
                    "select": self.select if k == last else None,
                }
            )
            for k in range(self.repeat)
        ]

    def check_after(self, before: StageSettings | None) -> None:
        made = before.intervals if isinstance(before, ProgressiveSettings) else None
        if self.ancestor == "before" and made != 2 * self.intervals:
            raise ValueError(
                f"`ancestor: before` needs a progressive stage of {2 * self.intervals} `intervals` before it"
            )

    def check_before(self, after: StageSettings | None) -> None:
        goes_on = isinstance(after, ProgressiveSettings) and after.ancestor == "before"
        if self.intervals > 1 and not goes_on:
            raise ValueError(
                f"a student of {self.intervals} `intervals` has rounds to go: `repeat` takes it to one step"
            )
        if self.intervals > 1 and self.select is not None:
            raise ValueError("`select` measures one step: it belongs to the round of one interval")
