"""A fingerprint follows everything that a data set is: what is made from one is never taken for that of another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from msdcli.data import prompts
from msdcli.data.base import fingerprint, fingerprint_of_version_1, images_hash
from msdcli.data.digits import Digits
from msdcli.data.folder import PIXELS, RECORD, DecodedPictures
from msdcli.data.glyphs import Glyphs
from msdcli.data.latents import Latents
from msdcli.data.toy2d import Toy2d
from msdcli.recipe.data import DigitsSettings, GlyphsSettings, Toy2dSettings

COUNT = 200  # more than a fingerprint of version 1 looked at


@dataclass
class Pictures:
    """Stored pictures, as plain as a data set can be."""

    pixels: Tensor = field(
        default_factory=lambda: torch.arange(COUNT * 12).remainder(251).to(torch.uint8).view(-1, 3, 2, 2)
    )
    classes: Tensor = field(default_factory=lambda: torch.arange(COUNT) % 3)
    class_names: list[str] = field(default_factory=lambda: ["cat", "dog", "emu"])
    mixed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.pixels.shape[1:])

    def __len__(self) -> int:
        return len(self.pixels)

    def stored(self, numbers: Sequence[int]) -> Tensor:
        return self.pixels[list(numbers)]

    def images(self, numbers: Sequence[int]) -> Tensor:
        return self.stored(numbers).float()

    def labels(self, numbers: Sequence[int]) -> Tensor:
        return self.classes[list(numbers)]


def changed(tensor: Tensor, at: tuple[int, ...]) -> Tensor:
    tensor = tensor.clone()
    tensor[at] += 1
    return tensor


PLAIN = Pictures()


@pytest.mark.parametrize("number", [0, 1, 2, 99, 197, 198, 199])
def test_any_one_pixel_and_any_one_label_count(number: int) -> None:
    assert fingerprint(replace(PLAIN, pixels=changed(PLAIN.pixels, (number, 2, 1, 0)))) != fingerprint(PLAIN)
    assert fingerprint(replace(PLAIN, classes=changed(PLAIN.classes, (number,)))) != fingerprint(PLAIN)


@pytest.mark.parametrize(
    "other",
    [
        {"class_names": ["cat", "emu", "dog"]},
        {"class_names": ["cat", "dog", "emu", "fox"]},
        {"mixed": True},
        {"pixels": PLAIN.pixels.view(-1, 1, 3, 4)},
        {"pixels": PLAIN.pixels.flip(0)},
        {"pixels": PLAIN.pixels.float()},
        {"pixels": PLAIN.pixels[:-1], "classes": PLAIN.classes[:-1]},
    ],
    ids=["names", "a class more", "turn", "shape", "order", "type", "count"],
)
def test_so_does_all_else(other: dict[str, Any]) -> None:
    assert fingerprint(replace(PLAIN, **other)) != fingerprint(PLAIN)


def test_equal_data_are_one_and_latents_are_named_by_their_pictures() -> None:
    assert fingerprint(replace(PLAIN, pixels=PLAIN.pixels.clone())) == fingerprint(PLAIN)
    assert fingerprint(Latents(PLAIN, (4, 1, 1))) == fingerprint(PLAIN)


def test_data_drawn_by_code_are_told_apart_by_their_settings() -> None:
    named = [
        fingerprint(Digits(DigitsSettings())),
        *(fingerprint(Toy2d(Toy2dSettings(points=n, seed=s))) for n, s in ((800, 0), (808, 0), (800, 1))),
        *(fingerprint(Glyphs(GlyphsSettings(count=n, seed=s))) for n, s in ((700, 0), (701, 0), (700, 1))),
        fingerprint(Glyphs(GlyphsSettings(count=700, channels=3))),
    ]
    assert len(set(named)) == len(named)
    assert fingerprint(Digits(DigitsSettings())) == named[0]


def test_prompts_with_pictures_follow_every_picture_and_which_row_has_which() -> None:
    captions = prompts.collect(iter([("a cat", "0"), ("a dog", "1")]), Path("x"))

    def of(pixels: Tensor, at: list[int]) -> str:
        return fingerprint(prompts.Prompts(captions, (3, 2, 2), pictures=replace(PLAIN, pixels=pixels), at=at))

    plain = of(PLAIN.pixels, [70, 71])
    assert plain == of(PLAIN.pixels.clone(), [70, 71])
    assert len({plain, of(PLAIN.pixels, [71, 70]), of(changed(PLAIN.pixels, (71, 0, 0, 0)), [70, 71])}) == 3


def test_decoded_pictures_know_their_hash_and_older_ones_find_it(tmp_path: Path) -> None:
    pixels = PLAIN.pixels.numpy()
    (tmp_path / PIXELS).write_bytes(pixels.tobytes())
    record = {"shape": [3, 2, 2], "class_names": PLAIN.class_names, "labels": PLAIN.classes.tolist()}
    (tmp_path / RECORD).write_text(json.dumps(record))
    data = DecodedPictures(tmp_path)
    assert data.images_hash() == images_hash(PLAIN), "the hash is of the stored bytes"
    assert fingerprint(data) == fingerprint(PLAIN)
    (tmp_path / RECORD).write_text(json.dumps(record | {"sha256": "kept"}))
    assert DecodedPictures(tmp_path).images_hash() == "kept"


def test_the_fingerprint_of_version_1_is_what_it_was() -> None:
    """Runs of msd 0.1.0 are compared by it; the digest is of labels and 64 images, as that version computed it."""
    assert fingerprint_of_version_1(Toy2d(Toy2dSettings(points=400))).startswith("863ebf037da8080f")
    other = replace(PLAIN, pixels=changed(PLAIN.pixels, (1, 0, 0, 0)))
    assert fingerprint_of_version_1(other) == fingerprint_of_version_1(PLAIN), "it knew too little"
