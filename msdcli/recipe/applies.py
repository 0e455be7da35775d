"""A recipe for reading: without keys that nothing reads, given what its other keys say.

A key is left out only where it has the value that it has without being said: what is printed is the same recipe.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from msdcli import recipe_yaml
from msdcli.recipe import Recipe
from msdcli.recipe.solver import CHURN, ORDERS

RATIO = ("ratio_clip", "ratio_bins", "ratio_rate")
HEADS = ("taps", "head_weight", "head_norm", "head_penalty", "tap_loss", "features", "gan_noise", "gan_span")


def applicable(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's keys and values, those aside that do not apply."""
    tree = recipe.dump()
    _drop(tree, recipe, {"latents"} if recipe.teacher.path is None else set())
    _drop(tree.get("data"), recipe.data, set())
    teacher = tree["teacher"]
    trained_alone = {"network", "training", "seed"}
    _drop(teacher, recipe.teacher, {"path", "source", "latent"} if recipe.teacher.path is None else trained_alone)
    _drop(teacher["solver"], recipe.teacher.solver, _solver(recipe))
    _drop(tree["partition"], recipe.partition, _partition(recipe))
    _drop(tree["pairs"], recipe.pairs, set() if recipe.needs_pairs else {"count", "shard"})
    student = recipe.student
    scaled = student.network is None and student.parameters is None and student.latency is None
    _drop(tree["student"], student, {"network", "parameters", "latency"} if scaled else {"width", "depth"})
    _drop(tree["student"], student, {"parts"})
    for part, entry in zip(student.parts or (), tree["student"].get("parts") or (), strict=True):
        _drop(entry, part, set(entry))
    for stage, said in zip(recipe.stages, tree["stages"], strict=True):
        _drop(said, stage, _stage(said))
    if "training" in teacher:
        _drop(teacher["training"], recipe.teacher.training, _stage(teacher["training"]))
    return tree


def readable(recipe: Recipe) -> str:
    """Return the recipe as YAML, without keys that do not apply."""
    return recipe_yaml.dump(applicable(recipe))


def _drop(tree: dict[str, Any] | None, section: BaseModel, names: set[str]) -> None:
    """Leave out keys of a section that are as they are without being said."""
    for name in names & (tree or {}).keys():
        field = type(section).model_fields[name]
        if tree is not None and getattr(section, name) == field.get_default(call_default_factory=True):
            del tree[name]


def _solver(recipe: Recipe) -> set[str]:
    solver = recipe.teacher.solver
    unread = set() if solver.name == "edm_churn" else {*CHURN}
    return unread | (set() if solver.name in ORDERS else {"order"}) | ({"sigmas"} if solver.sigmas is None else set())


def _partition(recipe: Recipe) -> set[str]:
    method = recipe.partition.method
    unread = set() if method == "kmeans" else {"features"}
    unread |= set() if method in ("kmeans", "random", "confusion") else {"seed"}
    unread |= set() if method in ("difficulty", "extend") else {"run"}
    unread |= set() if method == "extend" else {"retrain"}
    unread |= set() if method == "difficulty" else {"order"}
    return unread | (set() if method == "explicit" else {"parts"})


def _stage(said: dict[str, Any]) -> set[str]:
    """The keys of a stage that its other keys make idle."""
    unread = {"weight_decay"} if said.get("optimizer") == "adam" else set()
    if said.get("pairs") == "none":
        unread |= {"pair_weight", "pair_batch"}
    if said.get("divergence") == "rkl":
        unread |= {*RATIO}
    if said.get("objective") == "sid" and said.get("gan_weight") == 0:
        unread |= {*HEADS, *RATIO}
    if len(said.get("sigmas") or []) == 1:
        unread.add("student_input")
    return unread
