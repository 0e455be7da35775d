"""One file per objective; a recipe's `objective: dm` is the class in dm.py."""

import importlib

from msdcli.objectives.base import Objective

__all__ = ["Objective", "objective_class"]


def objective_class(name: str) -> type[Objective]:
    """Return the objective that `objectives/<name>.py` defines."""
    module = importlib.import_module(f"msdcli.objectives.{name}")
    return next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Objective) and value.__module__ == module.__name__
    )
