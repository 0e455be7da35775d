"""The house: imports point down, nothing imports in a circle, rooms stay small, and the start needs no torch."""

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment

PACKAGE = ROOT / "msdcli"
# What each part may import, beside itself. `engine.tracking.events` is what anybody may tell, the console too.
BELOW = {
    "errors": set(),
    "foreign": {"errors"},
    "seeds": set(),
    "recipe_yaml": {"errors"},
    "recipe": {"recipe_yaml", "errors"},
    "noise": {"seeds"},
    "rundir": {"recipe", "errors"},
    "outputs": {"rundir", "errors"},
    "records": {"rundir", "errors"},
    "sweep": {"recipe", "recipe_yaml", "errors"},
    "routing": {"seeds", "errors"},
    "partition": {"records", "rundir", "routing", "seeds", "errors"},
    "console": {"errors", "engine.tracking.events"},
    "data": {"recipe", "noise", "seeds", "foreign", "errors"},
    "diffusion": {"data", "noise", "seeds", "errors"},
    "nets": {"diffusion", "recipe", "foreign", "errors"},
    "metrics": {"diffusion", "nets", "data", "foreign", "errors"},
    "objectives": {"diffusion", "nets", "recipe", "errors"},
    "engine": {"sweep", "objectives", "metrics", "diffusion", "nets", "data", "partition", "routing", "rundir"}
    | {"outputs", "records", "recipe", "noise", "seeds", "foreign", "errors"},
    "cli": {"partition", "sweep", "engine", "console", "recipe", "rundir", "outputs", "foreign", "errors"},
}
# The rooms of the engine from the lowest to the highest: each may import those before it.
ROOMS = (
    {"tracking"},
    {"distributed"},
    {"checkpoints"},
    {"train", "pictures"},
    {"inputs", "estimate", "claim"},
    {"layers"},
    {"sample", "search"},
    {"measure"},
    {"partitioning", "results"},
    {"pipeline", "timing"},
    {"report", "export", "bench", "sweep", "plan", "proposal"},
    {"frontier", "teacher_proposal"},
)
LARGEST_ROOM, LONGEST_FILE = 13, 400


def module(path: Path) -> str:
    """The dotted name of a file, without `msdcli.`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, at any depth, without `msdcli.`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("msdcli.") for name in found if name.startswith("msdcli.")}


def graph(files: Iterable[Path]) -> dict[str, set[str]]:
    """Which file imports which others, whether at once, later, or for types only."""
    names = {module(path): path for path in files}

    def file_of(name: str) -> str:
        return name if name in names else name.rpartition(".")[0]

    return {
        name: {found for imported in imports(path) if (found := file_of(imported)) in names and found != name}
        for name, path in names.items()
    }


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The files of one circle of imports, in order; empty where there is none."""
    done: set[str] = set()

    def follow(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return trail[trail.index(name) :]
        if name in done:
            return []
        for other in sorted(edges.get(name, ())):
            if found := follow(other, [*trail, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := follow(name, []))), [])


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.name not in ("__init__.py", "__main__.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    allowed = BELOW[part] | {part}
    for name in imports(path):
        assert any(name == a or name.startswith(f"{a}.") for a in allowed), f"{part} must not import {name}"


def room_of(name: str) -> int:
    """How high a file of the engine stands."""
    return next(height for height, rooms in enumerate(ROOMS) if name.split(".")[1] in rooms)


@pytest.mark.parametrize("path", [p for p in FILES if "engine" in p.parts], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down_inside_the_engine(path: Path) -> None:
    if (own := module(path)) == "engine":
        return
    for name in imports(path):
        if name.startswith("engine.") and name.count(".") > 0:
            up = room_of(name) > room_of(own)
            aside = room_of(name) == room_of(own) and name.split(".")[1] != own.split(".")[1]
            assert not up and not aside, f"{own} must not import {name}"


def test_nothing_imports_in_a_circle(tmp_path: Path) -> None:
    edges = graph(FILES)
    assert circle(edges) == []
    edges["errors"].add("engine.train.loop")  # a planted one is found
    assert {"errors", "engine.train.loop"} <= set(circle(edges))


def test_rooms_and_files_stay_small() -> None:
    for folder in {path.parent for path in FILES}:
        inside = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(inside) <= LARGEST_ROOM, f"{folder.relative_to(ROOT)} holds {len(inside)} files"
    long = {module(p): n for p in FILES if (n := len(p.read_text(encoding="utf-8").splitlines())) > LONGEST_FILE}
    assert long.keys() <= {"nets.edm.pickles"}, long


def objective_files() -> list[Path]:
    """The files of objectives, and what all share; two of one name would be one objective."""
    files = [path for path in (PACKAGE / "objectives").rglob("*.py") if path.name != "__init__.py"]
    assert len({path.stem for path in files}) == len(files)
    return files


def test_objectives_know_only_what_they_continue() -> None:
    """An objective is one file; `adm` and `sid` are `dm` continued, `tcm` is `ect`, and say so."""
    for path in objective_files():
        of = [name.rpartition(".")[0] for name in imports(path) if name.startswith("objectives.")]
        others = {name.rpartition(".")[2] for name in of} - {"base"}
        assert others == {"adm": {"dm"}, "sid": {"dm"}, "tcm": {"ect"}}.get(path.stem, set()), path.name


@pytest.mark.parametrize(
    "statement", ["import msdcli", "import msdcli.cli", "from msdcli.recipe import load; load('digits')"]
)
def test_starting_loads_no_torch(statement: str) -> None:
    code = f"import sys; {statement}; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_every_objective_has_its_keys_and_every_key_its_objective() -> None:
    from typing import get_args

    from msdcli.recipe.stages import Stage

    named = {member.model_fields["objective"].default for member in get_args(get_args(Stage)[0])}
    files = {path.stem for path in objective_files()} - {"base"}
    assert named | {"ddo"} == files, "ddo is a stage of the teacher"
