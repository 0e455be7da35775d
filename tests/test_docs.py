"""The manual is true: its pages are there, its links lead somewhere, and its example objective trains."""

from __future__ import annotations

import re
import shutil
import subprocess
import typing

import pytest
import typer.main

from msdcli.cli import app
from msdcli.cli.docs import pages
from msdcli.recipe.stages import DdoSettings, Stage
from tests.conftest import ROOT, TINY, Msd, command, environment


def test_pages_are_listed_and_shown(msd: Msd) -> None:
    listed = msd("docs")
    assert listed.returncode == 0 and all(name in listed.stdout for name in pages())
    assert msd("docs", "numbers").stdout == pages()["numbers"].read_text(encoding="utf-8")
    assert "msd docs numbers" in msd("docs", "number").stderr


@pytest.mark.parametrize("topic", pages())
def test_commands_and_links_of_a_page_exist(topic: str) -> None:
    text = pages()[topic].read_text(encoding="utf-8")
    verbs = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"(?:^|`)msd ([a-z]+)", text, re.MULTILINE)) <= verbs
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (pages()[topic].parent / link).exists(), link


def test_every_objective_has_a_row_with_its_paper_keys_and_use() -> None:
    kinds = {kind.model_fields["objective"].default: kind for kind in (*typing.get_args(union()), DdoSettings)}
    rows = re.findall(r"^\| `(\w+)`([^|]*)\|([^|]+)\|([^|]+)\|([^|]+)\|([^|]+)\|$", objectives_page(), re.MULTILINE)
    assert kinds.keys() == {row[0] for row in rows}
    assert re.findall(r"\d{4}\.\d{5}", objectives_page())
    for name, _, what, papers, keys, when in rows:
        assert what.strip() and papers.strip() and when.strip(), name
        assert name == "regress" or re.search(r"\d{4}\.\d{4,5}|DMD2", papers), (name, papers)
        asked = " ".join(re.findall(r"`([^`]*)`", keys))
        for key in re.sub(r":\s*\S+", "", asked).split():
            assert key.split(".")[0] in kinds[name].model_fields, (name, key)


def objectives_page() -> str:
    return pages()["objective"].read_text(encoding="utf-8").partition("# Adding")[0]


def union() -> object:
    return typing.get_args(Stage)[0]


def test_the_example_objective_trains(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("objective")
    shutil.copytree(ROOT / "msdcli", folder / "msdcli")
    objective, keys = re.findall(r"```python\n(.*?)```", pages()["objective"].read_text(encoding="utf-8"), re.DOTALL)
    (folder / "msdcli" / "objectives" / "energy.py").write_text(objective)
    recipe = folder / "msdcli" / "recipe" / "stages.py"
    before, union, after = recipe.read_text().partition("\nStage = Annotated[")
    assert union
    recipe.write_text(before + "\n" + keys + union + "EnergySettings | " + after)
    stage = "stages:\n  - {objective: energy, steps: 40, batch: 32, lr: 1e-3, log_every: 10}\n"
    (folder / "my.yaml").write_text(TINY.partition("stages:")[0] + stage + "evaluation: {samples: 200}\n")
    done = subprocess.run(
        command("distill", "my.yaml"),
        cwd=folder,
        env=environment(PYTHONPATH=str(folder)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "l1_toy2d" in done.stdout
