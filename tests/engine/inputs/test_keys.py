"""What is shared between runs is named by all that it depends on: teachers, pairs, features, references."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msdcli import nets
from msdcli.data.digits import Digits
from msdcli.engine.checkpoints.model import save_model
from msdcli.engine.inputs import teacher as teachers
from msdcli.engine.inputs.pairs import Pairs
from msdcli.engine.measure import features
from msdcli.engine.tracking.events import silent
from msdcli.errors import UserError
from msdcli.metrics.inception import FeatureNetwork
from msdcli.recipe import Recipe, load
from msdcli.recipe.data import DigitsSettings
from msdcli.recipe.networks import UNetSettings
from msdcli.rundir import RunDir
from tests.conftest import Msd

RECIPE = """
name: x
data: {name: digits}
teacher: {network: {kind: unet, channels: 8, multipliers: [1], blocks: 1}, training: {steps: 1}}
stages: [{objective: dm, steps: 1}]
"""


def recipe(folder: Path, *words: str) -> Recipe:
    (folder / "r.yaml").write_text(RECIPE)
    return load(folder / "r.yaml", [f"run={folder}/runs/x", *words])


class Edited(Digits):
    """Digits of which one picture, or one label, is another."""

    def __init__(self, *, image: int | None = None, label: int | None = None) -> None:
        super().__init__(DigitsSettings())
        self._images, self._labels = self._images.clone(), self._labels.clone()
        if image is not None:
            self._images[image] *= -1
        if label is not None:
            self._labels[label] = (self._labels[label] + 1) % 10


def test_a_teacher_depends_on_every_picture_and_on_its_section(tmp_path: Path) -> None:
    plain, data = recipe(tmp_path), Edited()
    named = [
        teachers.teacher_key(plain, data),
        *(teachers.teacher_key(plain, Edited(image=i)) for i in (0, 1, 2, 1000)),
        teachers.teacher_key(plain, Edited(label=5)),
        *(
            teachers.teacher_key(recipe(tmp_path, word), data)
            for word in ("teacher.seed=1", "teacher.training.steps=2", "teacher.network.channels=16", "threads=1")
        ),
    ]
    assert len(set(named)) == len(named)
    same = recipe(tmp_path, "teacher.solver.steps=7", "teacher.guidance.scale=2", "teacher.training.label_dropout=0.1")
    other = recipe(tmp_path, "teacher.training.label_dropout=0.1")
    assert teachers.teacher_key(same, data) == teachers.teacher_key(other, data), "these come after training"


PAIRS_ALONE = "stages=[{objective: regress, steps: 2}]"


def make_teacher(folder: Path, *, sigma_data: float = 0.5) -> None:
    settings = UNetSettings(channels=8, multipliers=[1], blocks=1, attention=[8])
    torch.manual_seed(0)
    save_model(folder, nets.build(settings, shape=(1, 8, 8), num_classes=10, sigma_data=sigma_data), {"steps": 1})


def test_equal_weights_in_other_units_or_under_other_guidance_are_another_teacher(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs/x")
    make_teacher(run.teacher)
    make_teacher(tmp_path / "guide", sigma_data=0.4)
    dropout = "teacher.training.label_dropout=0.1"
    words = [
        [],
        *([dropout, f"teacher.guidance.scale={scale}"] for scale in (2, 3)),
        [dropout, "teacher.guidance={scale: 2, interval: [0.1, 2.0]}"],
        [PAIRS_ALONE, dropout, "teacher.solver.name=ddim", "teacher.guidance={scale: 1, schedule: cfg++}"],
        [dropout, "teacher.guidance={scale: 1}"],
        ["teacher.guidance={scale: 2, guide: perturbed}"],
        ["teacher.guidance={scale: 2, guide: perturbed, layers: [encoder]}"],
        [f"teacher.guidance={{scale: 2, guide: {tmp_path / 'guide'}}}"],
    ]
    hashes = [teachers.load(run, recipe(tmp_path, *more))[1] for more in words]
    guided = recipe(tmp_path, *words[-1])
    make_teacher(tmp_path / "guide", sigma_data=0.6)
    hashes.append(teachers.load(run, guided)[1])
    old = teachers.hash_of_version_1(run, recipe(tmp_path))
    make_teacher(run.teacher, sigma_data=1.0)
    hashes.append(teachers.load(run, recipe(tmp_path))[1])
    assert len(set(hashes)) == len(hashes)
    assert teachers.hash_of_version_1(run, recipe(tmp_path)) == old, "version 1 looked at the weights alone"


def test_pairs_depend_on_teacher_solver_seed_classes_and_turn(tmp_path: Path) -> None:
    plain, run, data = recipe(tmp_path), RunDir(tmp_path / "runs/x"), Edited()
    unmixed = Edited()
    unmixed.mixed = False  # type: ignore[misc]
    folders = [
        Pairs(run, plain, data, "a").folder,
        Pairs(run, plain, data, "b").folder,
        Pairs(run, plain, Edited(label=1), "a").folder,
        Pairs(run, plain, unmixed, "a").folder,
        *(
            Pairs(run, recipe(tmp_path, f"teacher.{word}"), data, "a").folder
            for word in (
                *("solver.name=deis", "solver={name: deis, order: 2}", "solver={sigmas: [9, 1]}", "solver.steps=7"),
                "solver.rho=5",
            )
        ),
        *(Pairs(run, recipe(tmp_path, word), data, "a").folder for word in ("pairs.seed=1", "pairs.shard=64")),
    ]
    assert len(set(folders)) == len(folders)


def test_features_depend_on_their_network_and_on_what_is_kept() -> None:
    def named(*parts: Any, protocol: str = "clean", sha256: str = "a", keep: bool = True) -> str:
        network = FeatureNetwork(protocol, lambda x: x, sha256=sha256)
        return features.FeatureExtractor(network, 8, keep=keep).key(*parts)

    names = [named("x"), named("y"), named("x", protocol="edm"), named("x", sha256="b"), named("x", keep=False)]
    assert len(set(names)) == len(names)


def test_a_reference_that_changes_while_it_is_measured_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "a.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    np.savez(path, images=pixels)

    def meddling(images: torch.Tensor) -> torch.Tensor:
        np.savez(path, images=255 - pixels)
        return images.float().flatten(1)

    def measured(network: FeatureNetwork) -> np.ndarray:
        found = features.of_reference(str(path), network, batch=8, workers=1, report=silent)
        assert isinstance(found, features.FeatureSet) and found.features is not None
        return found.features[:, 0]

    with pytest.raises(UserError, match="changed while it was measured"):
        measured(FeatureNetwork("clean", meddling, sha256="a"))
    np.savez(path, images=pixels)
    plain = FeatureNetwork("clean", lambda x: x.float().flatten(1), sha256="a")
    assert measured(plain).tolist() == pixels[:, 0, 0, 0].tolist()
    np.savez(path, images=255 - pixels)
    assert measured(plain).tolist() == (255 - pixels[:, 0, 0, 0]).tolist()


def test_a_preview_of_a_partition_is_the_runs_only_for_its_own_recipe(finished: Path, msd: Msd, tmp_path: Path) -> None:
    shutil.copytree(finished.parent, tmp_path / "runs")
    file = tmp_path / "runs/tiny/partition.json"
    known = json.loads(file.read_text())
    parts = known["parts"]
    file.write_text(json.dumps(known | {"parts": [parts[1], parts[0]]}))  # so that it can be told from a new one
    own = json.loads(msd("partition", "runs/tiny", "--json").stdout)
    other = json.loads(msd("partition", "runs/tiny", "data.seed=1", "--json").stdout)
    assert (own["parts"], other["parts"]) == ([parts[1], parts[0]], parts)
