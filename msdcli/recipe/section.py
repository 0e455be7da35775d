"""What every part of a recipe is, and the kinds of values in it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def ascending(values: list[float]) -> list[float]:
    """Return two numbers, the lower one first. ValueError where they are not so."""
    if len(values) != 2 or not values[0] < values[1]:
        raise ValueError(f"is two numbers, [low, high], the first below the second, not {values}")
    return values


def buildable(value: dict[str, Any]) -> dict[str, Any]:
    """Return a network's foreign settings. ValueError for a number that would be built for ever, or fill the memory."""
    for name, number in _numbers(value, ""):
        counted = any(word in name for word in ("layers", "blocks"))
        most = 1024 if counted else 65536 if name.endswith(("_size", "timesteps")) else 2**24
        if not abs(number) <= most:
            raise ValueError(f"{name or 'a number'} is {str(number)[:40]}, and at most {most} can be built")
    return value


def _numbers(value: Any, name: str, depth: int = 0) -> Iterator[tuple[str, float]]:
    """Yield every number of nested settings with its name; of a list, its length too."""
    if depth > 16:
        raise ValueError("nested more than 16 deep")
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, str(key), depth + 1)
    elif isinstance(value, list | tuple):
        yield f"the number of layers that {name} lists", len(value)
        for inner in value:
            yield from _numbers(inner, name, depth + 1)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


def expanded(path: str) -> str:
    """Return a path with `~` and the environment's variables put in. ValueError for a variable that is not set.

    A name that has been put in is left alone when a run reads its recipe again: what is there by that very name is
    meant.
    """
    if "\0" in path:
        raise ValueError("a path has no NUL in it")
    if ("$" not in path and not path.startswith("~")) or os.path.lexists(path):
        return path
    path = re.sub(r"\$(?:\{(\w+)\}|(\w+))", _variable, path)
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise ValueError(f"there is no home directory for {found.split('/')[0]}")
    return found


def _variable(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    if not os.environ.get(name):
        raise ValueError(f"the environment variable {name} is not set")
    return os.environ[name]


Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(ge=1e-30, le=1e30)]  # float32 ends at 1e-38 and 3e38
Weight = Annotated[float, Field(ge=0, le=1e6)]
LogLevel = Annotated[float, Field(ge=-20, le=20)]
Count = Annotated[int, Field(ge=1, le=10**12)]
Batch = Annotated[int, Field(ge=1, le=10**6)]
Steps = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, le=2**62)]
NoiseLevel = Annotated[float, Field(ge=1e-6, le=10_000)]
Levels = Annotated[list[NoiseLevel], Field(min_length=1, max_length=64)]
Span = Annotated[list[Fraction], AfterValidator(ascending)]
Scale = Annotated[float, Field(ge=0, le=100)]
Foreign = Annotated[dict[str, Any], AfterValidator(buildable)]
FilePath = Annotated[str, AfterValidator(expanded)]


class Section(BaseModel):
    """A part of a recipe: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
