"""Data sets are addressed by image number, and the number is the image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from msdcli.data import open_data
from msdcli.data.base import fingerprint, held_out, in_turn, split
from msdcli.data.toy2d import SHAPES
from msdcli.errors import UserError
from msdcli.recipe.data import DigitsSettings, FolderSettings, GlyphsSettings, Toy2dSettings


@pytest.mark.parametrize(
    "settings",
    [DigitsSettings(), Toy2dSettings(points=4000), GlyphsSettings(count=124, channels=3)],
    ids=lambda s: s.name,
)
def test_an_image_is_its_number(settings: DigitsSettings | Toy2dSettings | GlyphsSettings) -> None:
    data = open_data(settings)
    numbers = [5, 0, len(data) - 1, 5]
    assert torch.equal(data.images(numbers), torch.cat([data.images([n]) for n in numbers]))
    assert data.images(numbers).shape == (4, *data.shape) and data.images([0]).dtype == torch.float32
    assert data.labels(numbers).dtype == torch.int64
    assert set(data.labels(range(len(data))).tolist()) == set(range(len(data.class_names)))
    assert data.images(range(len(data))).abs().max() <= 1.1


def test_digits_are_the_librarys() -> None:
    data = open_data(DigitsSettings())
    assert (len(data), data.shape, data.labels([0, 1, 2]).tolist()) == (1797, (1, 8, 8), [0, 1, 2])
    assert data.images([0])[0, 0, 0].tolist() == [-1.0, -1.0, -0.375, 0.625, 0.125, -0.875, -1.0, -1.0]


def test_toy_points_do_not_depend_on_how_many_there_are() -> None:
    few, many = (open_data(Toy2dSettings(points=n)) for n in (80, 5000))
    assert torch.equal(few.images(range(80)), many.images(range(80)))
    assert not torch.equal(few.images([0]), open_data(Toy2dSettings(points=80, seed=1)).images([0]))


def test_toy_classes_are_different_shapes() -> None:
    data = open_data(Toy2dSettings(points=8000))
    points, labels = data.images(range(8000)), data.labels(range(8000))
    ring = points[labels == list(SHAPES).index("ring")].norm(dim=1)
    assert ring.std() < 0.03 and abs(ring.mean() - 0.9) < 0.01
    corners = points[labels == list(SHAPES).index("grid")]
    assert len((corners / 0.45).round().unique(dim=0)) == 25
    assert 0.3 < points.std() < 0.7


@pytest.mark.parametrize(("size", "channels"), [(16, 1), (32, 3), (64, 3)])
def test_glyphs_are_legible_at_every_size(size: int, channels: int) -> None:
    data = open_data(GlyphsSettings(size=size, channels=channels))
    images = data.images(range(62))
    assert images.shape == (62, channels, size, size)
    assert len(data.class_names) == 62
    flat = images.mean(1).flatten(1)
    assert (flat.max(1).values - flat.min(1).values).min() > 0.5, "ink stands out from paper"
    assert len({tuple(i.flatten().tolist()) for i in images}) == 62


def test_glyphs_come_in_many_typefaces() -> None:
    from msdcli.data.glyphs import CHARACTERS, typefaces

    assert len(typefaces()) >= 15
    assert CHARACTERS[10] == "A"


def test_files_sorted_by_class_are_sampled_from_all_classes(tmp_path: Path) -> None:
    for c in "abcd":
        (tmp_path / c).mkdir()
        for i in range(50):
            Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(tmp_path / c / f"{i}.png")
    data = open_data(FolderSettings(name="folder", path=str(tmp_path)))
    assert len(set(data.labels(range(40)).tolist())) == 1, "the files themselves are sorted"
    few = data.labels(in_turn(data, range(40))).bincount(minlength=4)
    assert few.min() >= 4 and few.sum() == 40
    assert data.labels(in_turn(data, range(200))).bincount().tolist() == [50] * 4, "a whole turn is all of the data"
    assert in_turn(data, range(200, 210)) == in_turn(data, range(10))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=200).map(torch.tensor), st.floats(0.01, 0.5))
def test_a_share_of_every_class_is_held_out(labels: torch.Tensor, share: float) -> None:
    held = held_out(labels, share)
    assert torch.equal(held, held_out(labels, share)) and torch.equal(held, held.unique())
    for k in labels.unique():
        n, away = int((labels == k).sum()), int((labels[held] == k).sum())
        assert away == (0 if n == 1 else max(1, round(share * n))) < n


def test_held_out_images_are_apart_from_those_that_are_trained_on() -> None:
    data = open_data(DigitsSettings())
    train, held = split(data, 0.1)
    assert (len(train), len(held)) == (1618, 179) and train.class_names == held.class_names == data.class_names
    every = torch.cat([train.images(range(len(train))), held.images(range(len(held)))])
    assert torch.equal(every.sum((1, 2, 3)).sort().values, data.images(range(1797)).sum((1, 2, 3)).sort().values)
    assert set(held.labels(range(179)).tolist()) == set(range(10))
    names = {fingerprint(part) for part in (data, train, held, split(data, 0.2)[0])}
    assert len(names) == 4 and fingerprint(split(data, 0.1)[0]) in names
    assert split(data, None) == (data, data)
    with pytest.raises(UserError, match="too few to measure"):
        split(open_data(Toy2dSettings(points=8)), 0.5)
