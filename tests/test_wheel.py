"""The wheel holds all that the commands need: they work where the source is not."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT, command, environment


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    built = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
    return folder / "site"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--version",), "msd 0."),
        (("recipes",), "toy"),
        (("docs", "samples"), "# Samples"),
        (("recipes", "show", "digits"), "objective: dm"),
        pytest.param(("distill", "digits", "--dry-run"), "students:", marks=pytest.mark.slow),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_commands_work_from_the_wheel(unpacked: Path, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    env = environment(PYTHONPATH=str(unpacked))
    where = subprocess.run(
        [sys.executable, "-c", "import msdcli; print(msdcli.__file__)"],
        **{"cwd": tmp_path, "env": env, "capture_output": True, "text": True},
    )
    assert where.stdout.startswith(str(unpacked))
    done = subprocess.run(command(*words), cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_files_that_travel_with_an_export_are_inside(unpacked: Path) -> None:
    given = unpacked / "msdcli" / "engine" / "export" / "given"
    assert {"students.py", "pipeline.py", "triton_model.py"} <= {path.name for path in given.iterdir()}
