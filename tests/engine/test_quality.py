"""What the shipped recipes reach: the orderings that the method promises, on real digits and on shapes in the plane."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, command, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def distilled(folder: Path, recipe: str, *overrides: str) -> dict[str, dict[str, float]]:
    """Run a shipped recipe and return the whole sets' figures; runs in one folder share teacher and pairs."""
    words = command("distill", str(ROOT / "recipes" / f"{recipe}.yaml"), *overrides, "--json")
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)["measurement"]
    return {row["who"]: row["values"] for row in result["rows"] if row["group"] == "whole"}


def test_digits_reach_what_the_readme_says(tmp_path: Path) -> None:
    same_size = distilled(tmp_path, "digits")
    teacher, students = same_size["teacher"]["fd_digits"], same_size["students"]["fd_digits"]
    assert teacher <= 1.5 * same_size["real halves"]["fd_digits"]
    assert students <= 2.5 * teacher
    assert same_size["students"]["accuracy"] >= 0.97

    with_tsm = distilled(tmp_path, "digits-small")["students"]["fd_digits"]
    random = distilled(tmp_path, "digits-dm", "name=random", "student.width=0.65")["students"]["fd_digits"]
    assert random >= 5 * with_tsm

    adversarial = distilled(tmp_path, "digits-adm")["students"]["fd_digits"]
    assert adversarial <= 1.2 * teacher


@pytest.mark.parametrize(
    "stage",
    [
        "{objective: dm, steps: 200, batch: 256, lr: 1e-3, betas: [0.5, 0.999], fake_updates: 3, fake_batch: shared,"
        " sigma_span: [0, 0.6]}",
        "{objective: cd, steps: 400, batch: 256, lr: 1e-3, levels: 12, sigma_init: 10}",
    ],
    ids=["dm", "cd"],
)
def test_more_students_come_closer_to_the_teacher_in_the_plane(tmp_path: Path, stage: str) -> None:
    one, eight = (
        distilled(tmp_path, "toy", f"name=k{k}", f"partition.students={k}", f"stages=[{stage}]")["students"]["l1_toy2d"]
        for k in (1, 8)
    )
    assert eight < one - 0.03
