"""What every part of a recipe is, and the kinds of numbers in it."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, le=10**12)]
Seed = Annotated[int, Field(ge=0, le=2**62)]
NoiseLevel = Annotated[float, Field(gt=0, le=10_000)]
Levels = Annotated[list[NoiseLevel], Field(min_length=1, max_length=64)]
Span = list[Fraction]
Scale = Annotated[float, Field(ge=0, le=100)]


class Section(BaseModel):
    """A part of a recipe: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
