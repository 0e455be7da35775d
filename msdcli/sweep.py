"""The sweep file: a recipe, rows of overrides, seeds; every row and seed is an ordinary run."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from msdcli import recipe_yaml
from msdcli.errors import UserError
from msdcli.recipe import Recipe, find, recipes_folder, validate
from msdcli.recipe.section import Section, Seed

MAX_ROWS = 1000  # times the seeds: runs


class RowSettings(Section):
    """One line of the table: what it is called and which keys it sets."""

    label: str = Field(min_length=1, max_length=100, description="name of the line in tables and pictures")
    recipe: str | None = Field(None, description="another recipe than the sweep's, for this line")
    set: dict[str, Any] = Field({}, description="dotted recipe keys and their values")


class SweepSettings(Section):
    """A grid of overrides, or rows written out, times seeds."""

    recipe: str = Field(description="a shipped recipe by name, or a path from the sweep file's folder")
    base: dict[str, Any] = Field({}, description="overrides that every row shares")
    rows: list[RowSettings] = Field([], max_length=1000, description="the lines of the table")
    grid: dict[str, list[Any]] = Field({}, description="dotted keys and their values: one line per combination")
    seeds: list[Seed] = Field([0, 1, 2], min_length=1, max_length=1000, description="one run per line and seed")
    seed_keys: list[str] = Field(["seed"], min_length=1, description="recipe keys that take the seed")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    label: str
    seed: int
    recipe: Recipe


@dataclass(frozen=True)
class Sweep:
    """A checked sweep: its cells in the order of the table."""

    name: str
    folder: Path
    cells: list[Cell]

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(cell.label for cell in self.cells))


def load(source: str | Path, *, folder: str | None = None) -> Sweep:
    """Read a sweep file (a path, or the name of a shipped one) and build the recipe of every cell.

    Runs live in runs/NAME/LABEL-seedS; they share what depends on the same things. UserError names what is wrong.
    """
    path = _find(source)
    document = recipe_yaml.Document.read(path)
    try:
        settings = SweepSettings.model_validate(document.tree)
    except ValidationError as error:
        found = error.errors(include_url=False)
        raise UserError(recipe_yaml.explain_all(document, SweepSettings, found, "the sweep")) from None
    if (count := len(settings.rows) + math.prod(map(len, settings.grid.values())) * bool(settings.grid)) > MAX_ROWS:
        raise UserError(f"{path}: {count:,} lines; a sweep has at most {MAX_ROWS:,}", hint="a smaller grid")
    root = Path(folder or f"runs/{path.stem}")
    rows = [*settings.rows, *_grid_rows(settings.grid)] or [RowSettings(label=path.stem)]
    cells = []
    for row in rows:
        near = path.parent / (row.recipe or settings.recipe)
        recipe = near if near.is_file() else find(row.recipe or settings.recipe)
        for seed in settings.seeds:
            keys = settings.base | row.set | dict.fromkeys(settings.seed_keys, seed)
            slug = f"{_slug(row.label)}-seed{seed}"
            keys |= {"name": slug, "run": str(root / slug)}
            cells.append(Cell(row.label, seed, _recipe(recipe, keys, f"{path}: {row.label}")))
    runs = [cell.recipe.run for cell in cells]
    if len(set(runs)) < len(runs):
        raise UserError(f"{path}: two lines have the same label")
    return Sweep(path.stem, root, cells)


def _recipe(path: Path, keys: dict[str, Any], where: str) -> Recipe:
    document = recipe_yaml.Document.read(path)
    for key, value in keys.items():
        document.set(key.split("."), value, f"{where}: {key}")
    return validate(document)


def _grid_rows(grid: dict[str, list[Any]]) -> list[RowSettings]:
    rows = []
    for values in itertools.product(*grid.values()) if grid else ():
        chosen = dict(zip(grid, values, strict=True))
        label = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in chosen.items())
        rows.append(RowSettings(label=label, set=chosen))
    return rows


def _slug(label: str) -> str:
    words = "".join(ch if ch.isalnum() else " " for ch in label.lower()).split()
    return "-".join(words) or "row"


def shipped() -> list[Path]:
    """Return the sweeps that travel with the package."""
    return sorted((recipes_folder() / "sweeps").glob("*.yaml"))


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    names = {p.stem: p for p in shipped()}
    if str(source) in names:
        return names[str(source)]
    near = recipe_yaml.nearest(path.stem, list(names))
    raise UserError(f"no sweep at {path}", hint=f"did you mean `{near}`?" if near else f"there are {', '.join(names)}")
