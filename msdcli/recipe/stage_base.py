"""What the stages of a recipe have in common; the stages themselves are in stages.py."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from msdcli.recipe.section import Batch, Fraction, Levels, NoiseLevel, Positive, Section, Steps, Weight

PairsOf = Literal["shared", "filtered", "none"]
Optimizer = Literal["adam", "adamw", "radam"]


class StageSettings(Section):
    """One stage of training: what every objective has in common."""

    objective: str = Field(description="what is minimised")
    steps: Steps = Field(1000, description="training steps (updates of the student)")
    batch: Batch = Field(64, description="images per update")
    lr: Positive = Field(1e-3, description="learning rate, for every network that `lr_of` does not name")
    lr_of: dict[str, Positive] = Field({}, description="learning rates of single networks, e.g. {fake: 1e-3}")
    lr_hold: Fraction = Field(0.5, description="part of the steps at full learning rate; then linear to `lr_end`")
    lr_end: Fraction = Field(0.02, description="last learning rate, as a part of the first")
    warmup: int = Field(0, ge=0, le=10**9, description="steps over which the learning rate rises from zero")
    optimizer: Optimizer = Field("adam", description="the optimizer; radam needs no warm-up")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.9, 0.999], min_length=2, max_length=2, description="Adam's betas"
    )
    weight_decay: Weight = Field(0.0, description="decoupled weight decay (adamw, radam)")
    clip: Positive | None = Field(None, description="largest norm of a network's gradient; absent: no clipping")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.99, description="decay of the average that samples are drawn from"
    )
    log_every: Steps | Literal["auto"] = Field(
        "auto", description="steps between two lines of metrics.jsonl; auto: 50 a stage, one in 100 steps at least"
    )

    @property
    def steps_per_line(self) -> int:
        """Steps between two lines of the log: a short stage has a curve, and a long one can be watched."""
        return min(max(self.steps // 50, 1), 100) if self.log_every == "auto" else self.log_every

    def keyed(self) -> dict[str, Any]:
        """Return the stage as plain data, for the keys of what is made by it. `auto` is the 20 there that was once the
        default: how often a line is written moves no weight.
        """
        return self.model_dump(mode="json") | ({"log_every": 20} if self.log_every == "auto" else {})

    @property
    def needs_images(self) -> bool:
        """Whether the stage looks at images of the data, beside their conditions."""
        return True

    @property
    def pairs_used(self) -> PairsOf:
        """Which of the teacher's pairs of noise and image the stage is trained on."""
        return "none"

    @property
    def is_teacher(self) -> bool:
        """Whether what the stage makes is the teacher of the stages after it."""
        return False

    def expanded(self) -> Sequence[Self]:
        """Return the stages that this one stands for: itself, or several, one after the other."""
        return [self]

    def check_after(self, before: StageSettings | None) -> None:
        """Raise ValueError where the stage cannot come after `before` (None: it is the first)."""

    def check_anew(self, before: StageSettings | None) -> None:
        """Raise ValueError for what earlier versions took and did not heed: a run that was begun so may go on."""
        if self.weight_decay and self.optimizer == "adam":
            raise ValueError("`weight_decay` is decoupled, which `optimizer: adam` is not: adamw")

    def check_sharded(self) -> None:
        """Raise ValueError where the stage's networks cannot be sharded (`fsdp`)."""

    @property
    def asks_teacher(self) -> bool:
        """Whether the loss asks the teacher, and not only for its samples."""
        return True

    def check_before(self, after: StageSettings | None) -> None:
        """Raise ValueError where the stage cannot come before `after` (None: it is the last)."""

    @property
    def evaluations(self) -> int:
        """How often the stage's network is evaluated for one image."""
        return 1


class SelectSettings(Section):
    """The average that measures best becomes the student, and not the last one: measured again and again in training.

    The figure that chooses is flattered by it; `msd fid` measures the finished run with other noise.
    """

    every: Steps = Field(description="steps between two measurements; the last step is measured too")
    samples: int = Field(2000, ge=2, le=10**7, description="samples of the student that are measured")
    protocol: Literal["data", "clean", "edm", "legacy-pytorch", "legacy-tensorflow", "clip", "dinov2"] = Field(
        "data", description="what measures them, as in `msd fid --protocol`; data: the data's own classifier"
    )

    def count(self, steps: int) -> int:
        """Return how often a stage of so many steps is measured."""
        return -(-steps // self.every)


class GeneratorSettings(StageSettings):
    """A stage that makes a generator: a student that is evaluated once at each of its noise levels."""

    sigmas: Levels = Field([2.5], description="noise levels at which the student is evaluated, one after the other")
    sigma_init: NoiseLevel | None = Field(
        None, exclude=True, description="the first noise level; alone it is short for `sigmas: [sigma_init]`"
    )
    classes: list[Annotated[int, Field(ge=0, lt=10**9)]] | None = Field(
        None,
        min_length=1,
        description="numbers of the classes that the stage trains on, images and pairs too; students that own none of "
        "them stay as they are. Absent: all",
    )
    select: SelectSettings | None = Field(
        None, description="keep the best of several averages, by a distance measured in training; absent: the last one"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_level(cls, given: Any) -> Any:
        """Take `sigma_init: s` for `sigmas: [s]`."""
        if not isinstance(given, dict) or given.get("sigma_init") is None:
            return given
        if "sigmas" in given and given["sigmas"] != [given["sigma_init"]]:
            raise ValueError("`sigma_init` is short for `sigmas` of one level: give one of them")
        return {key: value for key, value in given.items() if key != "sigma_init"} | {"sigmas": [given["sigma_init"]]}

    @model_validator(mode="after")
    def _levels_fall(self) -> Self:
        if any(low >= high for high, low in itertools.pairwise(self.sigmas)):
            raise ValueError(f"`sigmas` {self.sigmas} must fall from level to level")
        object.__setattr__(self, "sigma_init", self.sigmas[0])
        return self

    @property
    def evaluations(self) -> int:
        return len(self.sigmas)

    @model_validator(mode="after")
    def _there_is_something_to_choose(self) -> Self:
        if self.select is not None and self.select.every >= self.steps:
            raise ValueError(f"`select.every` {self.select.every} must be below `steps` {self.steps}")
        return self
