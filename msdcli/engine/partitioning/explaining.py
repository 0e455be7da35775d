"""Why a condition goes where it goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from msdcli import routing
from msdcli.data.base import PromptDataset
from msdcli.data.prompts import clean
from msdcli.engine.distributed import device
from msdcli.engine.inputs import prompts
from msdcli.engine.partitioning.making import class_vectors, preview, teacher_looked_at
from msdcli.engine.tracking.events import Report, silent
from msdcli.errors import UserError
from msdcli.partition import Partition, parse_classes
from msdcli.recipe import Recipe
from msdcli.recipe.data import PromptsSettings
from msdcli.rundir import RunDir

NEIGHBOURS = 5


@dataclass(frozen=True)
class Explanation:
    """Why a condition goes where it goes: its student, the second choice, how far the border to that one is and what
    part of the conditions that were trained on lie nearer to theirs (None without borders), and its neighbours.
    """

    condition: str
    student: int
    second: int | None
    margin: float | None
    percentile: float | None
    neighbours: list[dict[str, Any]]  # name, student and similarity (cosine) of conditions that were trained on
    seconds: dict[str, float]
    reason: str | None = None  # what was measured of a class, where that placed it

    def to_json(self) -> dict[str, Any]:
        return vars(self)


def explain(recipe: Recipe, asked: str, report: Report = silent) -> Explanation:
    """Explain where a prompt, or a class by number or name, goes. UserError for a class that does not exist."""
    partition, data = preview(recipe, report)
    run = RunDir(recipe.run_dir)
    if isinstance(data, PromptDataset):
        return _explain_prompt(run, recipe, partition, data, clean(asked), report)
    number = parse_classes(asked, data.class_names)
    if len(number) != 1:
        raise UserError("one class at a time")
    vectors = None
    if recipe.partition.method == "kmeans":
        vectors = class_vectors(recipe.partition, data, teacher_looked_at(run, recipe))
    others = partition.parts[partition.owner[number[0]]]
    if vectors is None:  # no geometry: its companions are all there is to say
        near = [{"name": data.class_names[c], "student": partition.owner[c]} for c in others if c != number[0]]
        name, said = data.class_names[number[0]], reasons(partition, data.class_names)
        why = said[number[0]] if said else None
        return Explanation(name, partition.owner[number[0]], None, None, None, near[:NEIGHBOURS], {}, why)
    return _explain(data.class_names[number[0]], vectors[number[0]], vectors, partition, data.class_names, {}, number)


def _explain_prompt(
    run: RunDir, recipe: Recipe, partition: Partition, data: PromptDataset, prompt: str, report: Report
) -> Explanation:
    if not prompt:
        raise UserError("a prompt is empty")
    store = prompts.for_recipe(run, recipe, data, report)
    dtype = recipe.data.embeddings if isinstance(recipe.data, PromptsSettings) else "float32"
    with prompts.text_folder(run, recipe) as text:
        prompt_router = prompts.PromptRouter(
            text, partition, store=store, device=device.resolve(recipe.device), dtype=dtype
        )
        prompt_router.number([prompt])
        pooled = prompt_router.look_up(torch.tensor([prompt_router.known]))[1][0].numpy()
    seconds = {"encoder": prompt_router.encoder_seconds, "routing": prompt_router.routing_seconds}
    same = [data.prompts.index(prompt)] if prompt in data.prompts else []
    return _explain(prompt, pooled, store.pooled, partition, data.prompts, seconds, same)


def _explain(
    name: str,
    vector: np.ndarray,
    vectors: np.ndarray,
    partition: Partition,
    names: Sequence[str],
    seconds: dict[str, float],
    itself: Sequence[int],
) -> Explanation:
    placed, rule = None, partition.rule
    if rule is not None:
        placed = rule.place([name], vector[None])
    student = partition.owner[itself[0]] if itself or placed is None else int(placed.owner[0])
    second = margin = percentile = None
    if rule is not None and placed is not None and placed.margin is not None and placed.second is not None:
        second, margin = int(placed.second[0]), float(placed.margin[0])
        theirs = rule.place(names, vectors).margin
        assert theirs is not None
        percentile = float((theirs < margin).mean() * 100)
    similar = cosine(vectors, vector)
    nearest = [int(i) for i in np.argsort(-similar, kind="stable") if int(i) not in itself][:NEIGHBOURS]
    near = [{"name": names[i], "student": partition.owner[i], "similarity": float(similar[i])} for i in nearest]
    return Explanation(name, student, second, margin, percentile, near, seconds)


def cosine(vectors: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """The cosine between each of `vectors` [n, width] and `vector`, both after subtracting the mean of all."""
    mean = np.asarray(vectors, np.float64).mean(0)
    here, rows = vector.astype(np.float64) - mean, list[np.ndarray]()
    for start in range(0, len(vectors), routing.CHUNK):
        chunk = np.asarray(vectors[start : start + routing.CHUNK], np.float64) - mean
        rows.append(chunk @ here / np.maximum(np.linalg.norm(chunk, axis=1) * np.linalg.norm(here), 1e-300))
    return np.concatenate(rows)


def reasons(partition: Partition, names: Sequence[str]) -> list[str]:
    """What was measured of every class, where that placed it; nothing for parts that look at no figure of a class."""
    found = partition.evidence or {}
    if (distances := found.get("distances")) is not None:
        rank = np.argsort(np.argsort(-np.array(distances), kind="stable"), kind="stable") + 1
        return [f"distance {d:.4g}, number {r} from the hardest" for d, r in zip(distances, rank, strict=True)]
    return [
        "mixed up with "
        + ", ".join(f"{names[m['number']]} {m['share']:.1%}{_where(partition, c, m['number'])}" for m in others)
        if others
        else "the only class"
        for c, others in enumerate(found.get("mixed_with", []))
    ]


def _where(partition: Partition, c: int, other: int) -> str:
    here, there = partition.owner[c], partition.owner[other]
    return "" if here == there else f" (student {there})"


def totals(partition: Partition) -> list[float] | None:
    """The sum of the distances of every student's classes, where they placed them."""
    if (distances := (partition.evidence or {}).get("distances")) is None:
        return None
    return [sum(distances[c] for c in part) for part in partition.parts]
