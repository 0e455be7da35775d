"""A recipe for a folder: it is a good one, says what it assumed, and fits what it is for."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msdcli import nets
from msdcli.engine import proposal, timing
from msdcli.engine.train.counting import forward_flops
from msdcli.nets.meta import on_meta
from msdcli.recipe import load
from tests.conftest import Msd


@pytest.fixture(autouse=True)
def device_of_known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "stage_seconds", lambda *arguments: arguments[3].flops / 1e11)
    monkeypatch.setattr(timing, "evaluation_rate", lambda *_: 1e11)
    monkeypatch.setattr(timing, "classifier_seconds", lambda *_: 5.0)


def save(folder: Path, size: tuple[int, int], *, grey: bool = True, count: int = 3) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(count):
        pixels = generator.integers(0, 256, (*size[::-1], *(() if grey else (3,))), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def test_a_folder_gets_a_recipe(msd: Msd, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        save(tmp_path / "pets" / name, (28, 28), count=6)
    Image.new("L", (50, 40)).save(tmp_path / "pets" / "cat" / "odd.png")  # one of another size changes nothing
    done = msd("recipes", "new", "pets", "--minutes", "20")
    assert done.returncode == 0, done.stderr
    assert "assumed: 28x28 pictures are filled up to 32x32" in done.stdout and "written: pets.yaml" in done.stdout
    assert "cat/odd.png: is 50x40" in done.stdout
    recipe = load("pets.yaml")
    assert recipe.data.size == 32 and recipe.data.pad == "edge" and recipe.data.channels == 1  # type: ignore[union-attr]
    assert recipe.partition.students == 2 and recipe.teacher.sigma_data == pytest.approx(0.59, abs=0.05)
    assert recipe.pairs.count == recipe.evaluation.samples
    checked = msd("recipes", "validate", "pets.yaml")
    assert checked.returncode == 0, checked.stderr
    assert "exists: nothing was written" in msd("recipes", "new", "pets").stderr
    assert "more than the classes (2)" in msd("recipes", "new", "pets", "other.yaml", "--students", "3").stderr


@pytest.mark.slow
def test_more_time_buys_a_larger_network_and_more_steps(tmp_path: Path) -> None:
    save(tmp_path / "a", (16, 16), grey=False)
    short, long = (proposal.propose(str(tmp_path), minutes=m, students=1) for m in (1, 600))
    assert "is short" in short.cautions[-1] and not long.cautions
    assert "channels: 8," in short.text and "channels: 128," in long.text
    assert sum(long.minutes.values()) == pytest.approx(600, rel=0.2)


@pytest.mark.parametrize("side", [8, 24, 40, 64])
def test_every_network_takes_the_pictures_and_is_no_cheaper_than_the_one_before(side: int) -> None:
    costs = []
    with on_meta():
        for settings in proposal._networks(side):
            net = nets.build(settings, shape=(1, side, side), num_classes=2, sigma_data=0.5)
            costs.append(forward_flops(net))
            assert (settings.patch > 1) == (side >= 24 and len(costs) <= 5)
    assert all(larger > 0.9 * smaller for smaller, larger in pairwise(costs))


def test_pictures_of_all_sizes_and_without_classes(tmp_path: Path) -> None:
    save(tmp_path / "x", (40, 30), count=2)
    save(tmp_path / "y", (300, 200), grey=False, count=1)
    for file in tmp_path.glob("*/*.png"):
        file.rename(tmp_path / f"{file.parent.name}{file.name}")
    (tmp_path / "z.png").write_bytes(b"no picture")
    found = proposal.propose(str(tmp_path), minutes=5)
    for said in ("labels: false", "crop: true", "resize: box", "size: 24", "on_bad: skip", "students: 1"):
        assert said in found.text, said
    assert "channels: 1\n" not in found.text


def test_minutes_are_met_or_it_says_what_the_shortest_run_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a", (16, 16))
    for minutes in (2.0, 10.0):
        met = proposal.propose(str(tmp_path), minutes=minutes, students=1)
        assert 0.8 * minutes < sum(met.minutes.values()) <= 1.1 * minutes
        assert not any("cannot be met" in line for line in met.cautions)
    monkeypatch.setattr(timing, "classifier_seconds", lambda *_: 600.0)
    short = proposal.propose(str(tmp_path), minutes=4, students=1)
    (said,) = [line for line in short.cautions if "4 min cannot be met here: the shortest run is about 10 min" in line]
    assert "10 min for what measures it" in said and "steps: 200, batch: 16" in short.text


def test_seconds_are_shared_out_by_what_parts_need_at_least() -> None:
    shares = {"a": 0.5, "b": 0.2, "c": 0.2}
    assert proposal._shared(100, shares, dict.fromkeys(shares, 1.0)) == pytest.approx({"a": 50, "b": 20, "c": 20})
    found = proposal._shared(100, shares, {"a": 1, "b": 1, "c": 60})
    assert found["c"] == 60 and sum(found.values()) <= 100 and found["a"] / found["b"] == pytest.approx(2.5)
    assert proposal._shared(10, shares, dict.fromkeys(shares, 40.0)) == dict.fromkeys(shares, 40.0), "too little"
