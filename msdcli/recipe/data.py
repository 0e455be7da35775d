"""The data a recipe can name: `name` is a file in data/."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from msdcli.recipe.section import Count, FilePath, Section, Seed

# The data: `name` is a file in data/.


class DigitsSettings(Section):
    """scikit-learn's handwritten digits: 1,797 grey 8x8 images, 10 classes, no download."""

    name: Literal["digits"] = Field("digits", description="handwritten digits")


class Toy2dSettings(Section):
    """Eight awkward shapes in the plane, one class each, drawn from code."""

    name: Literal["toy2d"] = Field("toy2d", description="shapes in the plane")
    points: int = Field(65536, ge=8, le=10**8, description="number of points")
    seed: Seed = Field(0, description="seed of the points")


class GlyphsSettings(Section):
    """Characters in many typefaces, drawn from code: procedural, 62 classes (0-9, A-Z, a-z), endless."""

    name: Literal["glyphs"] = Field("glyphs", description="characters in many typefaces")
    size: int = Field(16, ge=8, le=64, description="side in pixels")
    channels: Literal[1, 3] = Field(1, description="1: grey, 3: colour")
    count: int = Field(20_000, ge=62, le=10**8, description="number of images")
    seed: Seed = Field(0, description="seed of the images")


class FolderSettings(Section):
    """Pictures of your own: a folder (class/...), EDM's zip or folder with dataset.json, an .npz of arrays, or
    WebDataset shards with .cls files."""

    name: Literal["folder"] = Field("folder", description="pictures from a folder, a zip, an .npz or tar shards")
    path: FilePath = Field(description="the folder or file; shards: a .tar, a folder of them, or shards-{000..010}.tar")
    size: int | None = Field(None, ge=1, le=4096, description="side of the square images; absent: the first picture's")
    channels: Literal[1, 3] = Field(3, description="3: colour; 1: grey, and colour pictures are made grey")
    crop: bool = Field(False, description="cut the central square out of pictures that are not square")
    resize: Literal["none", "box", "bicubic", "lanczos"] = Field(
        "none", description="how pictures of another size are scaled; none: they are bad"
    )
    on_bad: Literal["refuse", "skip"] = Field(
        "refuse", description="pictures that are damaged or of another size: stop and list them, or leave them out"
    )
    labels: bool = Field(True, description="false: one class for all")
    classes: Count | None = Field(None, description="how many classes there must be")
    count: Count | None = Field(None, description="how many pictures there must be")
    source: str | None = Field(None, description="where the data come from: for whoever reads or plans the run")


class PromptsSettings(Section):
    """Texts, for a teacher with a text encoder: lines, JSONL or COCO captions; with pictures where there are any."""

    name: Literal["prompts"] = Field("prompts", description="texts, alone or with their pictures")
    path: FilePath = Field(description="a .txt (one a line), a .jsonl, or a .json of COCO captions or of a list")
    column: str | None = Field(None, description="JSON key of the text; absent: caption, text or prompt")
    images: FilePath | None = Field(None, description="folder or zip with the pictures that the rows name")
    image_column: str | None = Field(None, description="JSON key of a picture's name; absent: file_name, image or file")
    size: int | None = Field(None, ge=1, le=4096, description="side of the square images; absent: the first picture's")
    channels: Literal[1, 3] = Field(3, description="3: colour; 1: grey, and colour pictures are made grey")
    crop: bool = Field(False, description="cut the central square out of pictures that are not square")
    resize: Literal["none", "box", "bicubic", "lanczos"] = Field(
        "none", description="how pictures of another size are scaled; none: they are bad"
    )
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
        keys = ("size", "channels", "crop", "resize", "on_bad")
        return FolderSettings(path=self.images, labels=False, **{key: getattr(self, key) for key in keys})


DataSettings = DigitsSettings | Toy2dSettings | GlyphsSettings | FolderSettings | PromptsSettings
Data = Annotated[DataSettings, Field(discriminator="name")]
