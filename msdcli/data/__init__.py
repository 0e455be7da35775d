"""One file per data set; a recipe's `data: {name: digits}` is the class in digits.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msdcli.data.base import Dataset

if TYPE_CHECKING:
    from msdcli.recipe.data import DataSettings


def open_data(settings: DataSettings, *, planning: bool = False, made: tuple[int, ...] | None = None) -> Dataset:
    """Open the data set that a recipe names. With `planning`, one that is not there yet is what the recipe expects.

    A folder opens as it lies, decoding what is asked for; `engine.dataset` gives the decoded and checked whole.
    Prompts alone have no shape: theirs is `made`, the shape of what the teacher makes.
    """
    if settings.name == "prompts":
        from msdcli.data import folder, prompts

        if planning:
            return prompts.expected(settings, made or ())
        captions = prompts.read(settings)
        if settings.pictures is None:
            return prompts.Prompts(captions, made or ())
        pictures = folder.PictureFiles(settings.pictures)
        skip = settings.on_bad == "skip"
        return prompts.with_pictures(captions, pictures, pictures.names, skip=skip, where=str(settings.images))
    assert settings.name != "none", "the teacher says what there is"
    if settings.name == "digits":
        from msdcli.data.digits import Digits

        return Digits(settings)
    if settings.name == "glyphs":
        from msdcli.data.glyphs import Glyphs

        return Glyphs(settings)
    if settings.name == "folder":
        from msdcli.data import folder

        return folder.expected(settings) if planning else folder.PictureFiles(settings)
    from msdcli.data.toy2d import Toy2d

    return Toy2d(settings)
