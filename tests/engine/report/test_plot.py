"""`msd plot`: figures as vectors, with the run's numbers in them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.conftest import Msd


def texts(path: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


def test_the_table_has_the_figures(finished: Path, msd: Msd) -> None:
    done = msd("plot", "table", str(finished), "--out", "t.svg")
    assert done.returncode == 0, done.stderr
    stored = json.loads((finished / "metrics/l1_toy2d.json").read_text())["rows"]
    for who in ("teacher", "students"):
        row = next(r for r in stored if (r["who"], r["group"]) == (who, "whole"))
        assert f"{row['values']['l1_toy2d']:.3f}" in "\n".join(texts(Path("t.svg")))
    assert {"tiny", "l1_toy2d ↓", "teacher, 7 NFE"} <= set(texts(Path("t.svg")))


def test_each_way_to_sample_a_teacher_has_its_line(finished: Path, msd: Msd, tmp_path: Path) -> None:
    """Equal weights by another solver are another teacher in a table, and students of several steps are called so."""
    shutil.copytree(finished, tmp_path / "other")
    file = tmp_path / "other/recipe.yaml"
    recipe = yaml.safe_load(file.read_text())
    recipe["teacher"]["solver"]["steps"] += 1
    recipe["stages"][-1]["sigmas"] = [2.5, 0.5]
    file.write_text(yaml.safe_dump(recipe))
    assert msd("plot", "table", str(finished), "other", "--out", "t.svg").returncode == 0
    assert {"teacher, 7 NFE", "teacher, 9 NFE"} <= set(texts(Path("t.svg")))
    done = msd("plot", "toy", "other", "--out", "toy.svg")
    assert done.returncode == 0, done.stderr
    assert "students, 2 NFE" in texts(Path("toy.svg"))


def test_curves_of_several_runs_share_a_figure(finished: Path, msd: Msd, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "other")
    done = msd("plot", "curves", str(finished), "other", "--out", "c.svg")
    assert done.returncode == 0, done.stderr
    assert {"tiny", "other", "dm: loss of fake", "teacher: loss"} <= set(texts(Path("c.svg")))
    assert "<image" not in Path("c.svg").read_text(), "vectors"
    assert msd("plot", "curves", str(finished), "--health", "--out", "h.svg").returncode == 0
    assert "dm: speed, images per second" in texts(Path("h.svg"))


def test_points_are_drawn_as_vectors(finished: Path, msd: Msd) -> None:
    done = msd("plot", "toy", str(finished), "--out", "toy.svg")
    assert done.returncode == 0, done.stderr
    said = texts(Path("toy.svg"))
    assert {"ring", "moons", "data", "teacher, 7 NFE", "students, 1 NFE"} <= set(said)
    assert "<image" not in Path("toy.svg").read_text()


@pytest.mark.parametrize("name", ["c.pdf", "c.png"])
def test_other_formats(finished: Path, msd: Msd, name: str) -> None:
    assert msd("plot", "curves", str(finished), "--out", name).returncode == 0
    if name.endswith("pdf"):
        assert Path(name).read_bytes().startswith(b"%PDF")
    else:
        with Image.open(name) as image:
            assert image.size[0] > 1500


def test_what_cannot_be_drawn_is_refused(finished: Path, msd: Msd, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "bare")
    for path in [*Path("bare").rglob("metrics.jsonl"), *Path("bare/metrics").glob("*")]:
        path.unlink()
    for words, said in (
        (["curves", str(finished), "--out", "c.gif"], ".pdf, .svg, .png"),
        (["curves", "bare", "--out", "c.pdf"], "no curves were kept"),
        (["table", "bare", "--out", "c.pdf"], "nothing is measured yet"),
        (["toy", "nowhere", "--out", "c.pdf"], "nowhere is not a run"),
    ):
        done = msd("plot", *words)
        assert done.returncode == 2 and said in done.stderr, words
    assert not Path("c.pdf").exists()
