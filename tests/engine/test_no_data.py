"""No data at all: a given teacher says what there is, and stages that look at no real image distil it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from msdcli.data.base import fingerprint, has_images
from msdcli.data.conditions import Conditions
from msdcli.errors import WrongValueError
from msdcli.recipe import load
from tests.conftest import Msd

RECIPE = """
name: bare
threads: 1
workers: 1
teacher: {{path: {teacher}, solver: {{steps: 4}}}}
partition: {{students: 2}}
pairs: {{count: 16, shard: 16}}
stages: [{{objective: dm, steps: 2, batch: 4, fake_updates: 1}}]
"""


def test_a_teacher_is_distilled_without_data(finished: Path, msd: Msd, tmp_path: Path) -> None:
    (tmp_path / "bare.yaml").write_text(RECIPE.format(teacher=finished / "teacher"))
    planned = msd("distill", "bare.yaml", "--dry-run")
    assert planned.returncode == 0 and "data:      none: 8 classes of [2], which are the teacher's" in planned.stdout
    assert "evaluation " not in planned.stdout and "GiB" not in planned.stdout, "nothing is measured; KiB are said so"
    flops = json.loads(msd("distill", "bare.yaml", "--dry-run", "--json").stdout)["flops"]
    assert flops["evaluation"] == 0 and flops["all"] == flops["pairs"] + 2 * flops["student"]
    done = msd("distill", "bare.yaml")
    assert done.returncode == 0, done.stderr
    assert "no distance: there are no real images" in done.stdout and "msd fid runs/bare PICTURES" in done.stdout
    state = json.loads(msd("status", "runs/bare", "--json").stdout)
    assert state["done"] and [part["part"] for part in state["shared"]] == ["teacher"]
    assert msd("sample", "runs/bare", "--all").returncode == 0
    assert "try: msd fid runs/bare PICTURES --protocol clean" in msd("fid", "runs/bare").stderr
    assert msd("report", "runs/bare", "--no-pictures").returncode == 0
    page = (tmp_path / "runs/bare/report.html").read_text()
    assert "<code>msd fid runs/bare PICTURES --protocol clean</code>" in page and "finishes and measures" not in page
    needs = msd("distill", "bare.yaml", "stages.0.objective=adm", "name=other")
    assert needs.returncode == 2 and "the recipe names no data" in needs.stderr


def test_a_teacher_that_is_trained_needs_data(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("stages: [{objective: dm}]")
    with pytest.raises(WrongValueError, match="a teacher that is trained here needs images"):
        load(tmp_path / "r.yaml")


def test_classes_alone() -> None:
    data, other = Conditions((1, 4, 4), 3), Conditions((1, 4, 4), 0)
    assert not has_images(data) and torch.equal(data.labels([2, 0]), torch.tensor([2, 0]))
    assert (data.class_names, other.class_names) == (["0", "1", "2"], ["all"])
    assert fingerprint(data) == fingerprint(Conditions((1, 4, 4), 3)) != fingerprint(other)
