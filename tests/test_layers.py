"""Imports point down, and the command line starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment

# What each part may import, beside itself.
BELOW = {
    "errors": set(),
    "seeds": set(),
    "recipe_yaml": {"errors"},
    "recipe": {"recipe_yaml", "errors"},
    "rundir": {"recipe", "errors"},
    "outputs": {"rundir", "errors"},
    "records": {"rundir", "errors"},
    "sweep": {"recipe", "recipe_yaml", "errors"},
    "routing": {"seeds", "errors"},
    "partition": {"records", "rundir", "routing", "seeds", "errors"},
    "console": {"errors", "engine.events"},
    "diffusion": {"seeds", "errors", "data.base"},
    "data": {"diffusion", "recipe", "seeds", "errors"},
    "nets": {"diffusion", "recipe", "errors"},
    "metrics": {"diffusion", "nets", "data", "errors"},
    "objectives": {"diffusion", "nets", "recipe", "errors"},
    "engine": {
        *(
            "sweep",
            "objectives",
            "metrics",
            "diffusion",
            "nets",
            "data",
            "partition",
            "routing",
            "rundir",
            "outputs",
            "records",
            "recipe",
            "seeds",
            "errors",
        ),
    },
    "cli": {"partition", "sweep", "engine", "console", "recipe", "rundir", "outputs", "errors"},
}


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


FILES = sorted(
    p
    for p in (ROOT / "msdcli").rglob("*.py")
    if p.name not in ("__init__.py", "__main__.py") or p.parent != ROOT / "msdcli"
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    part = path.relative_to(ROOT / "msdcli").with_suffix("").parts[0]
    allowed = BELOW[part] | {part}
    for name in imports(path):
        assert any(name == a or name.startswith(f"{a}.") for a in allowed), f"{part} must not import {name}"


def test_objectives_know_only_what_they_continue() -> None:
    """An objective is one file; `adm` is `dm` continued, and says so."""
    folder = ROOT / "msdcli" / "objectives"
    for path in folder.glob("*.py"):
        others = {name.split(".")[1] for name in imports(path) if name.startswith("objectives.")} - {"base"}
        assert others == ({"dm"} if path.stem == "adm" else set()), path.name


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
    files = {p.stem for p in (ROOT / "msdcli" / "objectives").glob("*.py")} - {"__init__", "base"}
    assert named == files - {"classify"}, "classify judges; it is no stage of a recipe"
