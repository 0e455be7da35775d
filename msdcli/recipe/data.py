"""The data a recipe can name: `name` is a file in data/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from msdcli.recipe.section import Count, FilePath, Section, Seed

# The data: `name` is a file in data/.

GENERAL = ("data", "dataset", "folder", "images", "img", "imgs", "pictures", "png", "train", "training")


class DataSection(Section):
    """What every kind of data has in common."""

    name: str = Field(description="what the data are")

    @property
    def label(self) -> str:
        """What the data are called where a figure names them, as in `fd_digits`: letters, digits and `_`."""
        return self.name

    @property
    def mirrors(self) -> bool:
        """Whether images are mirrored at random wherever a network is trained on them."""
        return False


def label_of(path: str) -> str | None:
    """Return a name for the data at a path: that of the folder or file, and of the one around it where that says
    nothing. None where there is none.
    """
    said = re.sub(r"\{[^}]*\}", "", path)
    places = [part for part in Path(said).expanduser().resolve().parts if part != "/"]
    words = [
        re.sub(r"[^0-9a-z]+", "_", re.sub(r"\.(zip|npz|tar|tgz|gz)$", "", part.lower())).strip("_") for part in places
    ]
    if not words or not words[-1]:
        return None
    alone = words[-1] not in GENERAL or len(words) < 2 or not words[-2]
    return (words[-1] if alone else f"{words[-2]}_{words[-1]}")[:60]


class DigitsSettings(DataSection):
    """scikit-learn's handwritten digits: 1,797 grey 8x8 images, 10 classes, no download."""

    name: Literal["digits"] = Field("digits", description="handwritten digits")


class Toy2dSettings(DataSection):
    """Eight awkward shapes in the plane, one class each, drawn from code."""

    name: Literal["toy2d"] = Field("toy2d", description="shapes in the plane")
    points: int = Field(65536, ge=8, le=10**8, description="number of points")
    seed: Seed = Field(0, description="seed of the points")


class GlyphsSettings(DataSection):
    """Characters in many typefaces, drawn from code: procedural, 62 classes (0-9, A-Z, a-z), endless."""

    name: Literal["glyphs"] = Field("glyphs", description="characters in many typefaces")
    size: int = Field(16, ge=8, le=64, description="side in pixels")
    channels: Literal[1, 3] = Field(1, description="1: grey, 3: colour")
    count: int = Field(20_000, ge=62, le=10**8, description="number of images")
    seed: Seed = Field(0, description="seed of the images")


# How pictures are brought to one shape, whether alone or beside texts.
Side = Annotated[int | None, Field(ge=1, le=4096, description="side of the square images; absent: the first picture's")]
Channels = Annotated[Literal[1, 3], Field(description="3: colour; 1: grey, and colour pictures are made grey")]
Crop = Annotated[bool, Field(description="cut the central square out of pictures that are not square")]
Resize = Annotated[
    Literal["none", "box", "bicubic", "lanczos"],
    Field(description="how pictures of another size are scaled; none: they are bad"),
]
Pad = Annotated[
    Literal["none", "edge", "black", "white"],
    Field(
        description="how pictures smaller than `size` are filled up around: with their border's pixels, black or white"
    ),
]


def _check_padding(pad: str, size: int | None) -> None:
    if pad != "none" and size is None:
        raise ValueError("`pad` fills pictures up to `size`: say which")


class FolderSettings(DataSection):
    """Pictures of your own: a folder (class/...), EDM's zip or folder with dataset.json, an .npz of arrays, or
    WebDataset shards with .cls files."""

    name: Literal["folder"] = Field("folder", description="pictures from a folder, a zip, an .npz or tar shards")
    path: FilePath = Field(description="the folder or file; shards: a .tar, a folder of them, or shards-{000..010}.tar")
    size: Side = None
    channels: Channels = 3
    crop: Crop = False
    resize: Resize = "none"
    pad: Pad = "none"
    on_bad: Literal["refuse", "skip"] = Field(
        "refuse", description="pictures that are damaged or of another size: stop and list them, or leave them out"
    )
    mirror: bool = Field(
        False, description="teach with pictures mirrored left to right at random; never where they are measured"
    )
    held_out: float | None = Field(
        None,
        gt=0,
        le=0.5,
        description="part of every class's pictures that nothing is trained on and that distances are measured "
        "against, such as 0.1; absent: none, and distances are measured against all",
    )
    labels: bool = Field(True, description="false: one class for all")
    classes: Count | None = Field(None, description="how many classes there must be")
    count: Count | None = Field(None, description="how many pictures there must be")
    source: str | None = Field(None, description="where the data come from: for whoever reads or plans the run")

    @property
    def label(self) -> str:
        return label_of(self.path) or self.name

    @property
    def mirrors(self) -> bool:
        return self.mirror

    @model_validator(mode="after")
    def _padding_goes_to_a_size(self) -> FolderSettings:
        _check_padding(self.pad, self.size)
        return self


class PromptsSettings(DataSection):
    """Texts, for a teacher with a text encoder: lines, JSONL or COCO captions; with pictures where there are any."""

    name: Literal["prompts"] = Field("prompts", description="texts, alone or with their pictures")
    path: FilePath = Field(description="a .txt (one a line), a .jsonl, or a .json of COCO captions or of a list")
    column: str | None = Field(None, description="JSON key of the text; absent: caption, text or prompt")
    images: FilePath | None = Field(None, description="folder or zip with the pictures that the rows name")
    image_column: str | None = Field(None, description="JSON key of a picture's name; absent: file_name, image or file")
    size: Side = None
    channels: Channels = 3
    crop: Crop = False
    resize: Resize = "none"
    pad: Pad = "none"
    on_bad: Literal["refuse", "skip"] = Field(
        "refuse", description="pictures that are damaged, missing or of another size: stop, or leave the rows out"
    )
    embeddings: Literal["float16", "float32"] = Field("float16", description="how the prompts' embeddings are kept")
    count: Count | None = Field(None, description="how many different prompts there must be")
    source: str | None = Field(None, description="where the data come from: for whoever reads or plans the run")

    @property
    def pictures(self) -> FolderSettings | None:
        """The section of the pictures alone."""
        if self.images is None:
            return None
        keys = ("size", "channels", "crop", "resize", "pad", "on_bad")
        return FolderSettings(path=self.images, labels=False, **{key: getattr(self, key) for key in keys})

    @model_validator(mode="after")
    def _padding_goes_to_a_size(self) -> PromptsSettings:
        if self.images is not None:
            _check_padding(self.pad, self.size)
        return self


class NoDataSettings(DataSection):
    """No images: shape and classes are the teacher's, which is given; for stages that look at no real image."""

    name: Literal["none"] = Field("none", description="no images, only the teacher's classes")


DataSettings = NoDataSettings | DigitsSettings | Toy2dSettings | GlyphsSettings | FolderSettings | PromptsSettings
Data = Annotated[DataSettings, Field(discriminator="name")]
