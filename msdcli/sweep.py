"""The sweep file: a recipe, rows of overrides, seeds; every row and seed is an ordinary run."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from msdcli import recipe_yaml
from msdcli.errors import UserError
from msdcli.recipe import Recipe, find, recipes_folder, validate
from msdcli.recipe.section import Positive, Section, Seed

MAX_ROWS = 1000  # times the seeds: runs


class LineSettings(Section):
    """What a line of a table is called, and which keys it sets."""

    label: str = Field(min_length=1, max_length=100, description="name of the line in tables and pictures")
    recipe: str | None = Field(None, description="another recipe than the sweep's, for this line")
    set: dict[str, Any] = Field({}, description="dotted recipe keys and their values")


class RowSettings(LineSettings):
    """One line of the table; it can build on the runs of earlier ones."""

    runs: dict[str, str] = Field(
        {},
        description="dotted recipe keys that take the run of an earlier line, by its label, with the same seed; that "
        "run is finished first",
    )


class SizeSettings(LineSettings):
    """A size of students in a frontier, and how far its budget is doubled."""

    doublings: int | None = Field(
        None, ge=1, le=20, description="most doublings of this size's budget, where it has its own"
    )


class FrontierSettings(Section):
    """Distance against latency, budget and memory: sizes of students times their number, K, at equal training FLOPs."""

    sizes: list[SizeSettings] = Field(
        min_length=1, max_length=50, description="the students' networks, each a label and the keys that make it"
    )
    students: list[Annotated[int, Field(ge=2, le=10_000)]] = Field(
        [2, 5, 10], max_length=50, description="numbers of students, K, beside a single one"
    )
    budget: Positive = Field(
        description="FLOPs of training all students, the teacher's pairs included and the teacher itself not: the "
        "first budget, which is doubled; the steps of all stages are fitted to it"
    )
    doublings: int = Field(
        4,
        ge=1,
        le=20,
        description="most doublings of the budget: one student gets twice as much until its distance falls by less "
        "than the spread over seeds",
    )
    beyond: int = Field(1, ge=0, le=10, description="doublings of that budget that K students get too")
    all_budgets: bool = Field(
        False,
        description="every line at every budget, without waiting for what saturates one student: more runs, which many "
        "workers can begin at once",
    )
    large_batch: list[Annotated[int, Field(ge=2, le=10_000)]] = Field(
        [],
        max_length=50,
        description="numbers of devices that one student takes too, with as many times the batch: what they do in the "
        "same time as so many students",
    )

    def doublings_of(self, size: SizeSettings) -> int:
        """Return how often a size's budget is doubled at most."""
        return size.doublings or self.doublings

    @model_validator(mode="after")
    def _each_once(self) -> FrontierSettings:
        for name, values in (("students", self.students), ("large_batch", self.large_batch)):
            if len(set(values)) < len(values):
                raise ValueError(f"`{name}` {values} names a number twice")
        if long := next((size.label for size in self.sizes if len(size.label) > 40), None):
            raise ValueError(f"`sizes`: the label {long!r} is longer than 40 letters")
        return self


class SweepSettings(Section):
    """A grid of overrides, or rows written out, times seeds; or a frontier."""

    recipe: str = Field(description="a shipped recipe by name, or a path from the sweep file's folder")
    base: dict[str, Any] = Field({}, description="overrides that every row shares")
    rows: list[RowSettings] = Field([], max_length=1000, description="the lines of the table")
    grid: dict[str, list[Any]] = Field({}, description="dotted keys and their values: one line per combination")
    seeds: list[Seed] = Field([0, 1, 2], min_length=1, max_length=1000, description="one run per line and seed")
    seed_keys: list[str] = Field(["seed"], min_length=1, description="recipe keys that take the seed")
    frontier: FrontierSettings | None = Field(
        None, description="instead of rows and a grid: lines that follow from sizes, K and budgets"
    )

    @model_validator(mode="after")
    def _rows_or_frontier(self) -> SweepSettings:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` {self.seeds} names a seed twice")
        if self.frontier is not None and (self.rows or self.grid):
            raise ValueError("`frontier` makes its own lines: leave out `rows` and `grid`")
        return self


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    label: str
    seed: int
    recipe: Recipe
    needs: tuple[str, ...] = ()  # lines whose run of this seed comes first


@dataclass(frozen=True)
class Sweep:
    """A checked sweep: its cells in the order of the table; none of a frontier, whose lines follow from results."""

    name: str
    folder: Path
    cells: list[Cell]
    file: Path
    settings: SweepSettings

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(cell.label for cell in self.cells))

    def cell(self, row: RowSettings, seed: int) -> Cell:
        """Return a line's run of a seed. UserError where its keys make no good recipe."""
        named = row.recipe or self.settings.recipe
        near = self.file.parent / named
        others = {key: self._run(label, seed) for key, label in row.runs.items()}
        keys = self.settings.base | row.set | others | dict.fromkeys(self.settings.seed_keys, seed)
        run = self._run(row.label, seed)
        keys |= {"name": Path(run).name, "run": run}
        recipe = _recipe(near if near.is_file() else find(named), keys, f"{self.file}: {row.label}")
        return Cell(row.label, seed, recipe, tuple(row.runs.values()))

    def _run(self, label: str, seed: int) -> str:
        """The run directory of a line and seed."""
        return str(self.folder / f"{_slug(label)}-seed{seed}")

    def needed_by(self, cell: Cell) -> list[Cell]:
        """The runs that a run takes something from."""
        return [other for other in self.cells if other.seed == cell.seed and other.label in cell.needs]


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
    empty = Sweep(path.stem, Path(folder or f"runs/{path.stem}"), [], path, settings)
    if settings.frontier is not None:
        check_distinct(path, [size.label for size in settings.frontier.sizes])
        return empty
    rows = [*settings.rows, *_grid_rows(settings.grid)] or [RowSettings(label=path.stem)]
    check_distinct(path, [row.label for row in rows])
    for number, row in enumerate(rows):
        if unknown := set(row.runs.values()) - {other.label for other in rows[:number]}:
            raise UserError(f"{path}: {row.label}: runs names {min(unknown)!r}, and no line before it is called so")
    cells = [empty.cell(row, seed) for row in rows for seed in settings.seeds]
    return replace(empty, cells=cells)


def check_distinct(path: Path, labels: list[str]) -> None:
    """Raise UserError where two lines' runs would have one name."""
    if len({_slug(label) for label in labels}) < len(labels):
        raise UserError(f"{path}: two lines have the same label")


def _recipe(path: Path, keys: dict[str, Any], where: str) -> Recipe:
    document = recipe_yaml.Document.read(path)
    for key, value in keys.items():
        document.set(key.split("."), copy.deepcopy(value), f"{where}: {key}")  # later keys change what is inside
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
