"""The data's own classifier says how much it knows of images that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from msdcli.data.digits import Digits
from msdcli.diffusion.draws import Source
from msdcli.engine.measure import classifier
from msdcli.engine.measure.classifier import HeldOut, held_out
from msdcli.engine.measure.feature_metric import FidOptions, metric_of
from msdcli.engine.measure.rows import halves
from msdcli.engine.tracking.events import silent
from msdcli.metrics.evaluate import collect
from msdcli.recipe import Recipe, load
from msdcli.recipe.data import DigitsSettings
from msdcli.rundir import RunDir, read_json

RECIPE = """
name: x
threads: 1
data: {name: digits}
teacher: {network: {kind: unet, channels: 8, multipliers: [1], blocks: 1}, training: {steps: 1}}
stages: [{objective: dm, steps: 1}]
"""


class Noise:
    """Pictures whose classes nothing in them tells."""

    shape = (1, 8, 8)

    def __init__(self, count: int = 120, classes: int = 10) -> None:
        self._images = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        self._labels = torch.arange(count) % classes
        self.class_names = [str(k) for k in range(classes)]

    def __len__(self) -> int:
        return len(self._images)

    def images(self, numbers: Sequence[int]) -> Tensor:
        return self._images[list(numbers)]

    def labels(self, numbers: Sequence[int]) -> Tensor:
        return self._labels[list(numbers)]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "r.yaml").write_text(RECIPE)
    return load(tmp_path / "r.yaml", [f"run={tmp_path}/runs/x"])


@pytest.mark.parametrize("counts", [[100, 100], [1000, 3], [1, 1, 1, 1], [2] * 62, [1, 500], [37, 12, 9, 1], [4]])
def test_a_tenth_is_held_out_and_no_class_loses_all(counts: list[int]) -> None:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    away = held_out(labels)
    assert len(away) == sum(count for count in counts if count > 1) // 10
    assert away.tolist() == sorted(set(away.tolist())) == held_out(labels).tolist()
    gone = labels[away].bincount(minlength=len(counts))
    for count, lost in zip(counts, gone.tolist(), strict=True):
        assert lost < count and abs(lost - count / 10) < 1.5


def test_no_more_than_so_many_are_held_out() -> None:
    assert 4000 < len(held_out(torch.arange(200_000) % 7)) <= classifier.MOST


def test_what_is_held_out_is_not_trained_on() -> None:
    data = Digits(DigitsSettings())
    away = held_out(data.labels(range(len(data))))
    source = Source(data, range(10), without=away)
    assert not set(source.numbers.tolist()) & set(away.tolist())
    assert len(source.numbers) == len(data) - len(away) == len(source.image_labels)


@pytest.mark.parametrize(
    ("images", "right", "guessed", "knows"),
    [(180, 170, 19, True), (180, 18, 19, False), (180, 24, 18, False), (12, 12, 12, False), (0, 0, 0, False)],
)
def test_knowing_is_to_be_right_more_often_than_guessing(images: int, right: int, guessed: int, knows: bool) -> None:
    found = HeldOut(images, right, guessed)
    assert found.knows is knows
    assert bool(found.warnings("fd_x", 10)) is not knows


def test_a_classifier_of_noise_is_found_out(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "TRAINING", classifier.TRAINING.model_copy(update={"steps": 60}))
    data, on = Noise(), torch.device("cpu")
    metric = metric_of(RunDir(recipe.run_dir), recipe, data, FidOptions(), on, silent)
    (warning,) = metric.warnings
    assert "not shown to know anything" in warning and "of 12 images" in warning
    real = collect([(data.images(range(120)), data.labels(range(120)).numpy())], metric.network)
    (found,) = halves(metric, real)
    assert found.values["accuracy"] == metric.record["held_out"]["accuracy"] < 0.5, "of those it has seen it knows all"
    assert f"{found.values['accuracy']:.1%} right on 12 images that it was not trained on" in metric.protocol


def test_a_classifier_of_digits_knows_them(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "TRAINING", classifier.TRAINING.model_copy(update={"steps": 40}))
    run, data = RunDir(recipe.run_dir), Digits(DigitsSettings())
    own = classifier.provide(run, recipe, data, torch.device("cpu"), silent)
    assert own.held_out.images == 179 and own.held_out.knows and not own.held_out.warnings("fd_digits", 10)
    again = classifier.provide(run, recipe, data, torch.device("cpu"), silent)
    assert (again.sha256, again.held_out) == (own.sha256, own.held_out)
    assert read_json(run.classifier / "model.json")["held_out"] == vars(own.held_out)


def test_few_images_and_one_class_are_said(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "TRAINING", classifier.TRAINING.model_copy(update={"steps": 2}))
    for data, said in ((Noise(8, 2), "too few to hold any out"), (Noise(40, 1), "one class")):
        metric = metric_of(RunDir(recipe.run_dir), recipe, data, FidOptions(), torch.device("cpu"), silent)
        assert said in metric.warnings[0] and "--protocol clean" in metric.warnings[0]
