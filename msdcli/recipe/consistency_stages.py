"""Stages of consistency models: one answer along a whole path of the teacher or of the data."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from msdcli.recipe.section import Fraction, Levels, LogLevel, NoiseLevel, Positive, Weight
from msdcli.recipe.stage_base import GeneratorSettings, Optimizer, StageSettings

Path = Literal["teacher", "data"]


class CdSettings(GeneratorSettings):
    """Consistency distillation (Song et al. 2023, arXiv 2303.01469; improved as in arXiv 2310.14189)."""

    objective: Literal["cd"] = Field("cd", description="consistency distillation")
    sigmas: Levels = Field([80.0], description="noise levels at which the student is evaluated, one after the other")
    levels: int = Field(18, ge=2, le=10_000, description="noise levels of the schedule")
    anchor: float = Field(
        0.0,
        ge=0,
        le=10_000,
        description="noise level at which the student gives back what it is given, the first of the schedule; 0: none, "
        "and the schedule begins at 0.002; OpenAI's consistency models: 0.002",
    )

    @model_validator(mode="after")
    def _the_anchor_comes_first(self) -> Self:
        if self.anchor >= self.sigmas[-1]:
            raise ValueError(f"`anchor` {self.anchor} must be below the last of `sigmas`, {self.sigmas[-1]}")
        return self


class EctSettings(GeneratorSettings):
    """Easy consistency tuning (ECT, Geng et al. 2024, arXiv 2406.14548); with `huber_c` iCT's loss (2310.14189)."""

    objective: Literal["ect"] = Field("ect", description="consistency along steps that shrink while it trains")
    sigmas: Levels = Field([80.0], description="noise levels at which the student is evaluated, one after the other")
    optimizer: Optimizer = Field("radam", description="the optimizer (ECT: radam)")
    path: Path = Field(
        "teacher",
        description="how the lower end of a step is found: by one Euler step of the teacher (distillation), or as the "
        "same image with less of the same noise (ECT, iCT)",
    )
    P_mean: LogLevel = Field(-1.1, description="mean of ln(sigma), before it is cut to 0.002 and the first of `sigmas`")
    P_std: float = Field(2.0, ge=1e-6, le=20, description="standard deviation of ln(sigma)")
    rounds: int = Field(8, ge=1, le=64, description="rounds of equal length; a step is shorter by `q` in each (ECT: 8)")
    first_round: int = Field(
        0, ge=0, le=64, description="number of the first round, where an earlier stage went on to it"
    )
    q: float = Field(
        2.0, gt=1, le=1e4, description="r = sigma (1 - q^-(round + 1) (1 + 8 sigmoid(-sigma))), at least 0"
    )
    ratio_limit: Fraction = Field(0.999, description="largest 1 - q^-(round + 1) (TCM, FastGen: 0.999)")
    huber_c: Weight = Field(
        0.0,
        description="constant of the pseudo-Huber distance, as a part of the root of an image's numbers (iCT: "
        "0.00054); 0: the norm (ECT)",
    )
    weight: Literal["step", "c_out", "c_out^2"] = Field(
        "step", description="weight of the distance: 1 / (sigma - r), 1 / c_out or 1 / c_out^2 (EDM2 in FastGen)"
    )

    @property
    def asks_teacher(self) -> bool:
        return self.path == "teacher"

    def decay(self, step: int) -> float:
        """q^-(k + 1) in the round k of a step: a function of the step alone."""
        k = self.first_round + min(step * self.rounds // self.steps, self.rounds - 1)
        return max(self.q ** -(k + 1), 1 - self.ratio_limit)

    @model_validator(mode="after")
    def _a_step_goes_down(self) -> Self:
        if self.ratio_limit == 1 and self.q ** -(self.first_round + self.rounds) < 1e-6:
            raise ValueError("steps shrink below what float32 tells apart: fewer `rounds`, or a `ratio_limit` below 1")
        return self


class TcmSettings(EctSettings):
    """Truncated consistency models (TCM, Lee et al. 2024, arXiv 2410.14895): a consistency model's second stage."""

    objective: Literal["tcm"] = Field("tcm", description="consistency above a noise level")  # type: ignore[assignment]
    boundary: NoiseLevel = Field(
        1.0, description="the lowest noise level that is learnt; below it the stage before answers"
    )
    boundary_part: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.25, description="part of the images that sit at the boundary (TCM: 0.25)"
    )
    boundary_weight: Weight = Field(0.1, description="weight of their loss beside that of the others (TCM: 0.1)")
    P_mean: LogLevel = Field(0.0, description="place of Student's t, that ln(sigma) is drawn from above the boundary")
    P_std: float = Field(0.2, ge=1e-6, le=20, description="scale of Student's t")
    P_df: float = Field(
        0.01, ge=1e-3, le=1e4, description="its degrees of freedom: 0.01 is nearly uniform in ln ln sigma"
    )
    rounds: int = Field(1, ge=1, le=64, description="rounds of equal length; a step is shorter by `q` in each")
    first_round: int = Field(
        8, ge=0, le=64, description="number of the first round: the one that the stage before stopped at"
    )

    @model_validator(mode="after")
    def _levels_lie_above_the_boundary(self) -> Self:
        if self.boundary >= self.sigmas[-1]:
            raise ValueError(
                f"the last of `sigmas`, {self.sigmas[-1]}, must be above `boundary` {self.boundary}: below it nothing "
                "is learnt"
            )
        return self

    def check_after(self, before: StageSettings | None) -> None:
        if not isinstance(before, CdSettings | EctSettings | ScdSettings):
            raise ValueError("what is below `boundary` is asked of the stage before: put cd, ect or scd before it")
        if isinstance(before, CdSettings) and before.anchor:
            raise ValueError(
                "the stage before must have no `anchor`: a tcm gives back what it is given at noise level 0"
            )

    def check_anew(self, before: StageSettings | None) -> None:
        super().check_anew(before)
        if isinstance(before, TcmSettings):
            raise ValueError("a tcm learns nothing below its own `boundary`: put cd, ect or scd before it, and one tcm")
        if isinstance(before, GeneratorSettings) and before.sigmas[0] < self.boundary:
            raise ValueError(
                f"the stage before learns nothing above {before.sigmas[0]}, the first of its `sigmas`, and is asked up "
                f"to `boundary` {self.boundary}"
            )


class ScdSettings(GeneratorSettings):
    """Continuous-time consistency (sCM, Lu and Song 2024, arXiv 2410.11081), in sigma space."""

    objective: Literal["scd"] = Field("scd", description="consistency without steps, by a derivative along the path")
    sigmas: Levels = Field([80.0], description="noise levels at which the student is evaluated, one after the other")
    optimizer: Optimizer = Field("radam", description="the optimizer (sCM: radam)")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.9, 0.99], min_length=2, max_length=2, description="the optimizer's betas (sCM: 0.9, 0.99)"
    )
    path: Path = Field(
        "teacher", description="what the path follows: the teacher (sCD), or the data and its noise (sCT)"
    )
    P_mean: LogLevel = Field(-1.0, description="mean of ln(sigma), before it is cut to 0.002 and the first of `sigmas`")
    P_std: float = Field(1.4, ge=1e-6, le=20, description="standard deviation of ln(sigma)")
    derivative: Literal["forward", "central"] = Field(
        "forward",
        description="how the student's derivative along the path is taken: by forward-mode differentiation, exactly, "
        "or by central differences, for networks and sharded training that have no forward mode",
    )
    derivative_step: Annotated[float, Field(ge=1e-5, le=0.1)] = Field(
        1e-3, description="step of central differences, as a part of sigma"
    )
    tangent_warmup: Annotated[int, Field(ge=0, le=10**9)] = Field(
        10_000, description="steps over which the unstable part of the tangent comes in (sCM: 10,000)"
    )
    tangent_c: Positive = Field(0.1, description="c of the normalised tangent g / (rms(g) + c) (sCM: 0.1)")
    weight: Literal["1/sigma", "none"] = Field("1/sigma", description="weight of the noise levels (sCM: 1/sigma)")

    @property
    def asks_teacher(self) -> bool:
        return self.path == "teacher"

    def check_sharded(self) -> None:
        if self.derivative == "forward":
            raise ValueError("`fsdp`: stage scd has no forward mode of sharded networks: `derivative: central`")

    def warm(self, step: int) -> float:
        """w, the share of the tangent's second part: a function of the step alone."""
        return min(1.0, step / self.tangent_warmup) if self.tangent_warmup else 1.0
