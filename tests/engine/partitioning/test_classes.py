"""A stage of some classes trains their owners on these alone; the other students stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from msdcli.data import open_data
from msdcli.diffusion.draws import Draws, Source
from msdcli.engine import pipeline
from msdcli.engine.partitioning import making
from msdcli.engine.tracking.events import silent
from msdcli.errors import UserError
from msdcli.partition import Partition
from msdcli.recipe import load_any
from msdcli.recipe.data import Toy2dSettings
from msdcli.rundir import RunDir, file_hash

DM = {"objective": "dm", "steps": 2, "batch": 4}
TREE = {
    "name": "some",
    "threads": 1,
    "workers": 1,
    "data": {"name": "toy2d", "points": 256},
    "teacher": {"network": {"kind": "mlp", "channels": 8, "blocks": 1}, "training": {"steps": 1, "batch": 8}},
    "pairs": {"count": 64, "shard": 64},
    "partition": {"students": 2},
    "stages": [DM, DM | {"classes": [1, 2]}],
    "evaluation": {"samples": 64, "judge": "off"},
}


def test_a_source_of_some_classes_draws_what_their_own_would() -> None:
    data = open_data(Toy2dSettings(points=256))
    z = torch.randn(80, 2, generator=torch.Generator().manual_seed(0))
    pairs = (z, -z, torch.arange(80) % 8)
    some = Source(data, [0, 1, 2, 3], pairs=pairs)
    assert some.images(torch.tensor([0])).shape == (1, 2), (
        "the images of all are there, and not taken for those of some"
    )
    few, alone = some.only([1, 2, 7]), Source(data, [1, 2], pairs=pairs)
    mine, theirs = (Draws(source, 16, ("x", 3), 0) for source in (few, alone))
    assert torch.equal(mine.real()[0], theirs.real()[0]) and torch.equal(mine.real()[1], theirs.real()[1])
    assert torch.equal(mine.labels("uniform"), theirs.labels("uniform"))
    for a, b in zip(mine.pairs(True), theirs.pairs(True), strict=True):
        assert len(a) == len(b) == 16
    assert set(mine.pairs(True, 64)[2].tolist()) == {1, 2}
    assert set(mine.pairs(False, 64)[2].tolist()) == {1, 2, 7}, "shared pairs are of the stage's classes"
    assert set(Draws(some, 64, ("x", 3), 0).real()[1].tolist()) == {0, 1, 2, 3}, "the source itself is as it was"


def test_only_the_owners_of_a_stages_classes_learn(tmp_path: Path) -> None:
    recipe = load_any(TREE, {"run": str(tmp_path / "run")})
    for number in (0, 1):
        run = pipeline.distill(recipe, silent, student=number).run
    weights = [[file_hash(run.stage(k, i, "dm") / "model.safetensors") for i in (0, 1)] for k in (0, 1)]
    assert weights[0][0] != weights[0][1] and weights[1][0] == weights[1][1]


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([DM | {"classes": [1]}], "classes leaves student 1 out"),
        ([DM, DM | {"classes": [1], "sigmas": [2.0]}], "classes leaves student 1 out"),
        ([DM, DM | {"classes": [8]}], "classes names 8, there are 8"),
        ([DM, DM | {"classes": [1], "forget": {"classes": [1]}, "pairs": "none"}], "leave `classes` out"),
        ([DM, DM | {"classes": []}], "at least 1 item"),
    ],
)
def test_classes_that_cannot_be(tmp_path: Path, stages: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(UserError, match=said):
        pipeline.check(load_any(TREE | {"run": str(tmp_path / "run"), "stages": stages}, {}))


def test_a_stage_of_classes_without_pictures_is_refused(tmp_path: Path) -> None:
    tree = TREE | {"run": str(tmp_path / "run"), "pairs": {"count": 5, "shard": 5}}
    stages = [DM, DM | {"classes": [1, 7], "pairs": "filtered"}]
    with pytest.raises(UserError, match=r"pairs\.count 5\), and student 1"):
        pipeline.check(load_any(tree | {"stages": stages}, {}))


def test_what_is_kept_excuses_nobody_else() -> None:
    parts = Partition([[0, 1], [2], [3, 4, 5, 6, 7]], 8, "extend", evidence={"origins": ["kept", "retrained", "new"]})
    alone = load_any(TREE | {"stages": [DM | {"classes": [3]}]}, {})
    with pytest.raises(UserError, match="classes leaves student 1 out"):
        making._check_left_out(alone, 0, parts, [3])
    making._check_left_out(alone, 0, parts, [2, 3])


def test_parts_of_a_recipe_that_made_nothing_say_nothing_of_the_next(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.adopt(load_any(TREE, {"run": str(run.root)}))
    Partition([[0], [1, 2, 3, 4, 5, 6, 7]], 8, "explicit").save(run.partition)
    pipeline.check(
        load_any(TREE | {"stages": [DM | {"classes": [1]}]}, {"run": str(run.root), "partition.students": 1})
    )
