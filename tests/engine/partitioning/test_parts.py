"""A student whose classes have no pictures, or no pairs, is refused before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msdcli.engine import pipeline
from msdcli.engine.checkpoints.model import save_model
from msdcli.engine.inputs import teacher
from msdcli.engine.partitioning import making as partition
from msdcli.errors import UserError
from msdcli.recipe import Recipe, load
from tests.data.test_folder import picture


def recipe(folder: Path, labels: list[int], stage: dict[str, Any], **sections: Any) -> Recipe:
    images = np.stack([picture(i) for i in range(len(labels))])
    np.savez(folder / "a.npz", images=images, labels=np.array(labels))
    tree = {
        "name": "r",
        "data": {"name": "folder", "path": str(folder / "a.npz")},
        "teacher": {"network": {"kind": "unet", "channels": 8, "multipliers": [1], "blocks": 1, "embedding": 8}},
        "partition": {"students": 3},
        "stages": [{"steps": 1, "batch": 4} | stage, {"objective": "dm", "steps": 1, "batch": 4}],
    }
    (folder / "r.yaml").write_text(json.dumps(tree | sections))
    return load(folder / "r.yaml")


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"objective": "tsm"}, "stage tsm needs pictures, and student 0 has none: class 0 has none"),
        ({"objective": "cd"}, "stage cd needs pictures, and student 0"),
        ({"objective": "adm"}, "stage adm needs pictures, and student 0"),
        ({"objective": "dm", "labels": "data"}, r"stage dm needs pictures \(labels: data\), and student 0"),
        ({"objective": "dm", "pairs": "filtered"}, "stage dm needs pairs of its own .*, and student 0"),
    ],
)
def test_labels_that_begin_at_1(tmp_path: Path, stage: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        pipeline.check(recipe(tmp_path, [1, 2, 1, 2], stage))


def test_gaps_within_a_part_and_stages_that_look_at_no_pictures_are_right(tmp_path: Path) -> None:
    pipeline.check(recipe(tmp_path, [1, 2, 1, 2], {"objective": "dm"}))
    pipeline.check(recipe(tmp_path, [1, 2, 1, 2], {"objective": "tsm"}, partition={"students": 1}))
    parts = {"method": "explicit", "students": 2, "parts": [[0, 1], [2]]}
    pipeline.check(recipe(tmp_path, [1, 2, 1, 2], {"objective": "tsm"}, partition=parts))


def test_more_students_than_classes_with_pictures_need_no_teacher_to_be_refused(tmp_path: Path) -> None:
    method = {"method": "kmeans", "students": 3, "features": "embedding"}
    with pytest.raises(UserError, match="3 students are more than the 2 classes that have any: class 0 has none"):
        pipeline.check(recipe(tmp_path, [1, 2, 1, 2], {"objective": "tsm"}, partition=method))
    images = method | {"features": "images", "students": 2}
    with pytest.raises(UserError, match="k-means looks at the pictures of every class, and class 0 has none"):
        pipeline.check(recipe(tmp_path, [1, 2, 1, 2], {"objective": "dm"}, partition=images))


def test_pairs_that_are_too_few_for_a_part(tmp_path: Path) -> None:
    labels = [0] * 30 + [1] * 30 + [2]
    with pytest.raises(UserError, match=r"pairs\.count 2\), and student"):
        pipeline.check(
            recipe(tmp_path, labels, {"objective": "dm", "pairs": "filtered"}, pairs={"count": 2, "shard": 2})
        )


def test_a_partition_that_is_known_later_is_checked_then(tmp_path: Path) -> None:
    method = {"method": "kmeans", "students": 2, "features": "embedding"}
    known = recipe(tmp_path, [1, 2, 1, 2], {"objective": "tsm"}, partition=method)
    data = pipeline.check(known)
    with pytest.raises(UserError, match="student 1 has none: class 0 has none"):
        partition.check_parts(known, data, partition.Partition([[1, 2], [0]], 3, "kmeans"))


@pytest.mark.parametrize("stage", [{"objective": "adm"}, {"objective": "dm", "labels": "data"}])
def test_pairs_are_looked_for_beside_pictures(tmp_path: Path, stage: dict[str, Any]) -> None:
    """Every class has pictures, and the two pairs are of class 0."""
    labels = [0] * 30 + [1] * 30 + [2]
    with pytest.raises(UserError, match=r"pairs\.count 2\), and student"):
        pipeline.check(recipe(tmp_path, labels, stage | {"pairs": "filtered"}, pairs={"count": 2, "shard": 2}))


def test_a_stage_of_classes_without_pairs_is_refused(tmp_path: Path) -> None:
    labels, stage = [0] * 30 + [1] * 30 + [2], {"objective": "dm", "classes": [2], "pairs": "shared"}
    known = recipe(tmp_path, labels, {"objective": "dm"}, pairs={"count": 2, "shard": 2})
    first = known.stages[0]
    of = known.model_copy(update={"stages": [first, first.model_copy(update=stage)]})
    with pytest.raises(UserError, match="needs pairs of its classes, and none of 2 is of one"):
        partition.check_parts(of, pipeline.check(known))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["partition.method=kmeans", "partition.features=images"], "k-means by images needs real ones"),
        (["student.parameters=0.5", "student.prune=layers"], "weighs every block by real images"),
    ],
)
def test_what_looks_at_images_needs_data(tmp_path: Path, words: list[str], said: str) -> None:
    """A given teacher needs no data, and what is asked for here does."""
    given = recipe(tmp_path, [0, 1, 2, 0], {"objective": "dm"})
    teacher.new_network(given.teacher, pipeline.check(given))
    save_model(tmp_path / "t", teacher.new_network(given.teacher, pipeline.check(given)), {})
    alone = load(tmp_path / "r.yaml", ["data={name: none}", f"teacher.path={tmp_path / 't'}", *words])
    with pytest.raises(UserError, match=said):
        pipeline.check(alone)


def test_decay_that_adam_does_not_decouple_is_refused(tmp_path: Path) -> None:
    stage = {"objective": "dm", "weight_decay": 0.01}
    with pytest.raises(UserError, match="stage dm: `weight_decay` is decoupled, which `optimizer: adam` is not"):
        pipeline.check(recipe(tmp_path, [0, 1, 2, 0], stage))
    pipeline.check(recipe(tmp_path, [0, 1, 2, 0], stage | {"optimizer": "adamw"}))
    of_teacher = recipe(tmp_path, [0, 1, 2, 0], {"objective": "dm"}).teacher.model_dump(mode="json")
    of_teacher["training"]["weight_decay"] = 0.01
    with pytest.raises(UserError, match="stage edm: `weight_decay` is decoupled"):
        pipeline.check(recipe(tmp_path, [0, 1, 2, 0], {"objective": "dm"}, teacher=of_teacher))


def test_a_target_finds_another_network_than_the_teachers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`init: teacher` is for the teacher's network"):
        recipe(tmp_path, [0, 1, 2, 0], {"objective": "dm"}, student={"parameters": 0.5, "init": "teacher"})
