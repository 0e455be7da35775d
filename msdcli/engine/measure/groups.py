"""Groups of classes that a user wants measured: `animals=0-397`, or the parts of another run's partition."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from msdcli.errors import UserError
from msdcli.partition import Partition, parse_classes
from msdcli.rundir import RunDir

Groups = dict[str, list[int]]


def parse(said: Sequence[str], classes: Collection[int], class_names: Sequence[str] = ()) -> Groups:
    """Return name -> class numbers for every `NAME=3,7,10-19` (numbers, spans, class names) and every path of a run or
    a partition.json. UserError for what is neither, for a class that is not among `classes`, and for a name said twice.
    """
    groups: Groups = {}
    for text in said:
        name, found, members = text.partition("=")
        if found and re.fullmatch(r"whole|(student|class) [0-9]+", name):
            raise UserError(f"group: {name!r} is the name of a line that is there without it", hint="another name")
        new = {name: _members(name, members, class_names)} if found and name else _parts(Path(text))
        for name, members_ in new.items():
            if name in groups:
                raise UserError(f"group: {name!r} is there twice")
            if unknown := sorted(set(members_) - set(classes)):
                raise UserError(f"group {name}: class {unknown[0]} does not exist here")
            groups[name] = members_
    return groups


def _members(name: str, text: str, class_names: Sequence[str]) -> list[int]:
    try:
        return sorted(set(parse_classes(text, class_names)))
    except UserError as error:
        raise UserError(
            f"group {name}: {error.message}", hint="--group even=0,2,4 or --group low=0-4 or --group pets=cat,dog"
        ) from None


def _parts(path: Path) -> Groups:
    file = RunDir(path).partition if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"group {path}: neither NAME=CLASSES nor a partition",
            hint="--group even=0,2,4,6,8, or the path of a run or of a partition.json",
        )
    return {f"student {k} of {path}": part for k, part in enumerate(Partition.load(file).parts)}
