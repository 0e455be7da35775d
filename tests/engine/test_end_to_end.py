"""Somebody else's teacher and somebody's own pictures, through the ordinary commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import msdcli
from msdcli.engine.checkpoints.model import load_model
from tests.conftest import Msd
from tests.data.test_folder import encoded, make_zip, picture
from tests.engine.inputs.test_importing import pickled

RECIPE = """
name: own
threads: 1
workers: 1
data: {{name: folder, path: {data}}}
teacher: {{path: teacher.pkl, solver: {{steps: 3}}}}
partition: {{students: 2, method: kmeans}}
pairs: {{count: 32, shard: 16}}
student: {{width: {width}}}
stages:
  - {{objective: tsm, steps: 2, batch: 8, log_every: 1}}
  - {{objective: dm, steps: 2, batch: 8, fake_updates: 2, log_every: 1}}
evaluation: {{samples: 64}}
"""


def class_folder(path: Path) -> str:
    for i in range(48):
        (path / f"class{i % 3}").mkdir(parents=True, exist_ok=True)
        (path / f"class{i % 3}/{i:03d}.png").write_bytes(encoded(picture(i), "png"))
    return path.name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(("preconditioning", "width"), [("EDM", 0.5), ("EDM2", 1.0)])
def test_a_pickle_is_distilled_sampled_measured_and_exported(
    msd: Msd, tmp_path: Path, kind: str, preconditioning: str, width: float
) -> None:
    data = class_folder(tmp_path / "d") if kind == "folder" else make_zip(tmp_path / "d.zip").name
    changes = {"channel_mult": [1, 1], "model_channels": 16, "img_channels": 3, "label_dim": 3}
    pickled(tmp_path / "teacher.pkl", preconditioning, **changes)
    (tmp_path / "own.yaml").write_text(RECIPE.format(data=data, width=width))
    done = msd("distill", "own.yaml", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["measurement"]
    assert {"teacher", "students"} <= {row["who"] for row in result["rows"]}
    student, _ = load_model(tmp_path / "runs/own/students/0/1-dm")
    assert student.settings.arguments["model_channels"] == int(16 * width)

    assert msd("sample", "runs/own", "--all", "-n", "6", "--format", "npz", "--out", "s.npz").returncode == 0
    with np.load(tmp_path / "s.npz") as file:
        assert file["images"].shape == (6, 8, 8, 3)
    exported = msd("export", "runs/own", "--out", "given", "--json")
    assert exported.returncode == 0, exported.stderr
    assert json.loads(exported.stdout)["max_difference"] == 0
    given, mine = msdcli.load(tmp_path / "given"), msdcli.load(tmp_path / "runs/own")
    assert torch.equal(given.sample([2, 0, 1]), mine.sample([2, 0, 1]))
