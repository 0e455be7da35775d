"""One file per objective; a recipe's `objective: dm` is the class in dm.py, here or in the folder of a family."""

import importlib
import pkgutil

from msdcli.objectives.base import Objective

__all__ = ["Objective", "objective_class"]


def objective_class(name: str) -> type[Objective]:
    """Return the objective that `<name>.py` defines, in `objectives/` or in one of its folders."""
    found = pkgutil.walk_packages(__path__, f"{__name__}.")
    module = importlib.import_module(next(m.name for m in found if m.name.rpartition(".")[2] == name and not m.ispkg))
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Objective) and value.__module__ == module.__name__
    )
