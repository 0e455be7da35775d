"""Characters drawn with the fonts that matplotlib carries: procedural pictures of 62 classes, as many as wanted.

Nothing here was photographed or written by hand: typeface, weight, size, slant, turn, place and colours of image i
are drawn from a generator seeded with i. It stands in for a data set with more than ten classes where none can be
downloaded.
"""

from __future__ import annotations

import functools
import hashlib
import json
import string
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from msdcli.data.base import spread
from msdcli.recipe.data import GlyphsSettings
from msdcli.seeds import derive

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
FAMILIES = (
    "DejaVuSans*.ttf",
    "DejaVuSerif*.ttf",
    "STIXGeneral*.ttf",
    "cmr10.ttf",
    "cmss10.ttf",
    "cmtt10.ttf",
    "cmb10.ttf",
)
OVERSAMPLING = 4
DRAWING = 1  # the version of the code below: another number where it draws something else


@functools.cache
def typefaces() -> list[Path]:
    """Return the font files that have every character, in a stable order."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return sorted(p for pattern in FAMILIES for p in folder.glob(pattern) if "Display" not in p.name)


@functools.cache
def _font(path: Path, pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), pixels)


class Glyphs:
    """[1 or 3, size, size] in [-1, 1]; image i shows character i mod 62."""

    mixed = True

    def __init__(self, settings: GlyphsSettings) -> None:
        self.settings = settings
        self.shape = (settings.channels, settings.size, settings.size)
        self.class_names = list(CHARACTERS)

    def __len__(self) -> int:
        return self.settings.count

    def labels(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor([n % len(CHARACTERS) for n in numbers], dtype=torch.int64)

    def images(self, numbers: Sequence[int]) -> Tensor:
        pixels = np.stack([self._draw(n) for n in numbers]) if len(numbers) else np.empty((0, *self.shape), np.uint8)
        return torch.from_numpy(pixels).to(torch.float32) / 127.5 - 1

    def images_hash(self) -> str:
        """Return a hash of what decides the images: the settings, the typefaces and the code that draws.

        To draw them all takes half a millisecond each. What the libraries change (Pillow's text, its filters) shows in
        every picture, so some are drawn to tell.
        """
        faces = [hashlib.sha256(path.read_bytes()).hexdigest() for path in typefaces()]
        said = json.dumps([DRAWING, self.settings.model_dump(mode="json"), faces])
        return hashlib.sha256(said.encode() + self.images(spread(len(self))).numpy().tobytes()).hexdigest()

    def _draw(self, number: int) -> np.ndarray:
        """Return image `number` as uint8 [channels, size, size]."""
        rng = np.random.Generator(np.random.Philox(derive("glyphs", self.settings.seed, number)))
        mask = self._mask(CHARACTERS[number % len(CHARACTERS)], rng)
        ink, paper = self._colours(rng)
        picture = paper[:, None, None] + (ink - paper)[:, None, None] * mask
        return np.asarray(picture + 0.5).astype(np.uint8)

    def _mask(self, character: str, rng: np.random.Generator) -> np.ndarray:
        """Draw the character large, turn and slant it, and shrink it: [size, size] from 0 (paper) to 1 (ink)."""
        side = self.settings.size * OVERSAMPLING
        faces = typefaces()
        font = _font(faces[rng.integers(len(faces))], round(side * rng.uniform(0.62, 0.88)))
        weight = int(rng.integers(0, 1 + side // 48))
        canvas = Image.new("L", (side, side))
        ImageDraw.Draw(canvas).text((side / 2, side / 2), character, 255, font, anchor="mm", stroke_width=weight)
        turn, slant = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(-0.2, 0.2)
        matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ [[1, slant], [0, 1]]
        centre = np.array([side / 2, side / 2])
        offset = centre - matrix @ (centre + rng.uniform(-0.06, 0.06, 2) * side)
        coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
        canvas = canvas.transform((side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
        small = canvas.resize((self.settings.size, self.settings.size), Image.Resampling.BOX)
        return np.asarray(small, np.float64) / 255

    def _colours(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return ink and paper [channels], 0 to 255, far enough apart to read."""
        while True:
            ink, paper = rng.uniform(0, 255, (2, self.settings.channels))
            if abs(ink.mean() - paper.mean()) > 90:
                return ink, paper
