"""One file per data set; a recipe's `data: {name: digits}` is the class in digits.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msdcli.data.base import Dataset

if TYPE_CHECKING:
    from msdcli.recipe import DataSettings


def open_data(settings: DataSettings, *, planning: bool = False) -> Dataset:
    """Open the data set that a recipe names. With `planning`, one that is not there yet is what the recipe expects.

    A folder opens as it lies, decoding what is asked for; `engine.dataset` gives the decoded and checked whole.
    """
    if settings.name == "digits":
        from msdcli.data.digits import Digits

        return Digits(settings)
    if settings.name == "glyphs":
        from msdcli.data.glyphs import Glyphs

        return Glyphs(settings)
    if settings.name == "folder":
        from msdcli.data import folder

        return folder.expected(settings) if planning else folder.Pictures(settings)
    from msdcli.data.toy2d import Toy2d

    return Toy2d(settings)
