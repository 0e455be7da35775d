"""A student whose classes have no pictures, or no pairs, is refused before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msdcli.engine import pipeline
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
