"""Find a student's network for a target: a share of the teacher's parameters, or of its latency on this device.

Fewer parameters do not mean less time: in the paper 42 % fewer bought 7 % (MSD, arXiv 2410.23274, Section 5.4). So
width, depth and attention are searched together, and what counts is measured here.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from msdcli import nets, records
from msdcli.data.base import Dataset
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.guidance import unguided
from msdcli.engine import layers
from msdcli.engine.tracking.events import Report
from msdcli.engine.tracking.formatting import named_students
from msdcli.engine.train.counting import FlopCounter
from msdcli.engine.train.precision import timed_in_turn
from msdcli.errors import UserError
from msdcli.nets.meta import on_meta
from msdcli.recipe import Recipe
from msdcli.recipe.networks import Network, NetworkSettings, PrunedUNetSettings, UNetSettings
from msdcli.recipe.student import StudentSettings
from msdcli.rundir import RunDir, lock, write_json

WIDTHS = [w / 20 for w in range(20, 2, -1)]
DEPTHS = [1.0, 0.75, 0.5, 0.25]
MEASURED = 16  # candidates that are timed: those whose operation count comes nearest to the target
TRIES = 6  # of a target of latency, each with one that is drawn in
CLOSE = 0.15  # how far under a target of parameters a candidate may lie


@dataclass(frozen=True)
class Candidate:
    """A network, as shares of the teacher's parameters, operations and (where it was timed) latency."""

    network: NetworkSettings
    parameters: float
    flops: float
    latency: float | None = None

    def record(self) -> dict[str, Any]:
        return vars(self) | {"network": self.network.model_dump(mode="json")}


def resolve(run: RunDir, recipe: Recipe, teacher: Denoiser, report: Report, data: Dataset | None = None) -> Recipe:
    """Return the recipe with its students' networks settled; a search is made once per run and size, and kept in
    student.json.

    This is a decision of the run and no cache: it depends on the recipe and the teacher, which cannot change in a run,
    and on the device that it was begun on, for weights that fit one network fit no other.

    UserError if no network of the teacher's kind meets the target.
    """
    targets = searched(recipe)
    if not targets:
        return recipe
    with lock(run.root, "the run directory", wait=report):
        for numbers in targets:
            student, path = recipe.student.of(numbers[0]), choice_file(run, recipe, numbers)
            if path.exists():
                continue
            where = "student" if recipe.student.parts is None else f"student.parts.{numbers[0]}"
            chosen, tried = (
                search(student, teacher, where)
                if data is None or not student.prune
                else prune(student, teacher, data, where)
            )
            write_json(path, {"target": student.model_dump(mode="json"), "chosen": chosen.record(), "tried": tried})
            report(_said(chosen, "student" if recipe.student.parts is None else named_students(numbers)))
    found = settled(run, recipe)
    assert found is not None, "it was written"
    return found


def searched(recipe: Recipe) -> list[Sequence[int]]:
    """Return the students whose networks are searched when a run starts, those of one search together."""
    return [numbers for numbers in recipe.sizes if recipe.student.of(numbers[0]).target is not None]


def choice_file(run: RunDir, recipe: Recipe, numbers: Sequence[int]) -> Path:
    """Return where a run keeps what was chosen for some students: one file for all, or one for each size."""
    return run.searched(None if recipe.student.parts is None else numbers[0])


def settled(run: RunDir, recipe: Recipe) -> Recipe | None:
    """Return the recipe with the networks that the run has searched; None where it has not yet, or had nothing to
    search. UserError where a record is damaged.
    """
    targets = searched(recipe)
    paths = [choice_file(run, recipe, numbers) for numbers in targets]
    if not targets or not all(path.exists() for path in paths):
        return None
    return _with_networks(recipe, targets, [_chosen(path) for path in paths])


def _chosen(path: Path) -> NetworkSettings:
    chosen_network = records.read(path, records.Searched, "choice of a network")["chosen"]["network"]
    try:
        return TypeAdapter[NetworkSettings](Network).validate_python(chosen_network)
    except ValidationError as error:
        raise UserError(f"{path} does not describe a network msd knows: {error}") from None


def _with_networks(recipe: Recipe, targets: list[Sequence[int]], networks: list[NetworkSettings]) -> Recipe:
    student = recipe.student
    for numbers, network in zip(targets, networks, strict=True):
        student = student.with_network(numbers, network)
    return recipe.model_copy(update={"student": student})


def stand_in(recipe: Recipe, teacher: Denoiser) -> Recipe:
    """Return the recipe with networks in the place of those that are still to be searched, to count a run's cost by:
    the widest whose share of the teacher's parameters is at most the target, else the narrowest. A share of latency is
    taken for one of parameters, with which operations go, and with these the time.
    """
    size = _parameters(teacher.settings, teacher)
    networks: list[NetworkSettings] = [teacher.settings.scaled(width, 1.0) for width in WIDTHS]

    def nearest(target: float) -> NetworkSettings:
        return next((n for n in networks if _parameters(n, teacher) <= target * size), networks[-1])

    targets = searched(recipe)
    shares = [recipe.student.of(numbers[0]).target or 1.0 for numbers in targets]
    found = _with_networks(recipe, targets, [nearest(share) for share in shares])
    return found.model_copy(update={"student": found.student.model_copy(update={"init": "random"})})


def _said(chosen: Candidate, whose: str) -> str:
    keys = {
        k: v
        for k, v in chosen.network.model_dump().items()
        if k in ("channels", "blocks", "attention", "arguments", "without")
    }
    return (
        f"{whose}: chose {keys}: {chosen.parameters:.0%} of the teacher's parameters, {chosen.flops:.0%} of its "
        f"operations, {chosen.latency or 0:.0%} of its latency here (one image, median)"
    )


def search(
    student: StudentSettings, teacher: Denoiser, where: str = "student"
) -> tuple[Candidate, list[dict[str, Any]]]:
    """Return the best candidate and all that were timed; `where` the recipe says the target.

    For `parameters`: the fastest of those just under the target. For `latency`: the largest of those that are fast
    enough.
    """
    target = student.parameters or student.latency or 1.0
    span = (0.0, 1.0) if student.parameters is None else (target * (1 - CLOSE), target)
    found = candidates(teacher, span)
    near = sorted(found, key=lambda c: abs(c.flops - target))[:MEASURED]
    timed = [Candidate(c.network, c.parameters, c.flops, latency(c, teacher)) for c in near]
    if student.parameters is not None:
        best = min(timed, key=lambda c: c.latency or 1.0, default=None)
    else:
        fast = [c for c in timed if c.latency is not None and c.latency <= target]
        best = max(fast, key=lambda c: c.parameters, default=None)
    if best is None:
        kind = "parameters" if student.parameters is not None else "latency"
        smallest = min(timed or candidates(teacher), key=lambda c: getattr(c, kind) or 1.0, default=None)
        share = None if smallest is None else getattr(smallest, kind)
        told = "" if share is None else f"; the smallest share found is {share:.2f}"
        above = None if share is None else math.ceil(share * 20 + 0.2) / 20  # measured again, it may be a little more
        raise UserError(
            f"{where}: no network of the teacher's kind has {target:g} of its {kind} on this device{told}",
            hint=(f"{where}.{kind}={above:g}, " if above is not None and target < above < 1 else "another target, ")
            + f"or {where}.width and {where}.depth by hand",
        )
    return best, [c.record() for c in timed]


def prune(
    student: StudentSettings, teacher: Denoiser, data: Dataset, where: str = "student"
) -> tuple[Candidate, list[dict[str, Any]]]:
    """Return the teacher without the blocks that cost the least, and all that were tried on the way to the target.

    Shares of parameters add up exactly; of time they nearly do, so what was chosen is timed and the target drawn in.
    """
    plain = unguided(teacher)
    timed, target = student.parameters is None, student.parameters or student.latency or 1.0
    blocks = layers.by_latency(plain, data) if timed else layers.by_parameters(plain, data)
    size, work = _parameters(plain.settings, plain), _flops(plain.settings, plain)
    goal, tried = target, list[Candidate]()
    for _ in range(TRIES):
        if (names := layers.cheapest(blocks, 1 - goal)) is None:
            break
        network = PrunedUNetSettings(**plain.settings.model_dump(exclude={"kind"}), without=names)
        found = Candidate(network, _parameters(network, plain) / size, _flops(network, plain) / work)
        tried.append(replace(found, latency=latency(found, plain)))
        if (reached := (tried[-1].latency if timed else tried[-1].parameters) or 1.0) <= target * (1 + 1e-9):
            return tried[-1], [c.record() for c in tried]
        goal *= target / reached * 0.98
    kind, least = ("latency", "parameters")[not timed], 1 - sum(block.saved for block in blocks)
    found_least = f"without any of its blocks the teacher has {least:.2f} of its {kind}"
    if least <= target:  # times that add up badly, or move from one look to the next
        fastest = min(candidate.latency or math.inf for candidate in tried)
        found_least = f"of {len(tried)} networks with fewer blocks the fastest took {fastest:.2f} of the teacher's time"
    raise UserError(
        f"{where}: {found_least}, and {target:g} was asked for",
        hint=f"a larger {where}.{kind}, or student.prune left out: then fewer channels are tried too",
    )


def candidates(teacher: Denoiser, span: tuple[float, float] = (0.0, 1.0)) -> list[Candidate]:
    """Every distinct network of the grid whose share of the teacher's parameters lies in `span`, counted without
    memory.
    """
    base, seen = teacher.settings, dict[str, NetworkSettings]()
    for width, depth in itertools.product(WIDTHS, DEPTHS):
        scaled = base.scaled(width, depth)
        plain = [scaled.model_copy(update={"attention": []})] if isinstance(scaled, UNetSettings) else []
        for network in [scaled, *plain]:
            seen[network.model_dump_json()] = network
    size, work = _parameters(base, teacher), _flops(base, teacher)
    shares = [(n, _parameters(n, teacher) / size) for n in seen.values() if n != base]
    return [Candidate(n, share, _flops(n, teacher) / work) for n, share in shares if span[0] <= share <= span[1]]


def _parameters(network: NetworkSettings, teacher: Denoiser) -> int:
    with on_meta():
        return sum(p.numel() for p in built(network, teacher).parameters())


def _flops(network: NetworkSettings, teacher: Denoiser) -> int:
    """Return the floating-point operations of one evaluation."""
    with on_meta(), FlopCounter() as counter, torch.no_grad():
        built(network, teacher)(*_one(teacher, "meta"))
    total: int = counter.total
    return total


def built(network: NetworkSettings, teacher: Denoiser) -> Denoiser:
    """Return a network of a section with random weights, for the images, classes and prompts of the teacher."""
    net = nets.build_like(network, teacher)
    net.prompts = teacher.prompts
    return net


def _one(teacher: Denoiser, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    classes = torch.zeros(1, dtype=torch.int64, device=device)
    return torch.zeros(1, *teacher.shape, device=device), torch.ones(1, device=device), classes


@torch.no_grad()
def latency(candidate: Candidate, teacher: Denoiser, *, repeats: int = 15) -> float:
    """Return the candidate's time per evaluation of one image as a share of the teacher's: medians, taken in turn."""
    device = next(teacher.parameters()).device
    student, inputs = built(candidate.network, teacher).to(device).eval(), _one(teacher, device)
    calls = {"student": lambda: student(*inputs), "teacher": lambda: teacher(*inputs)}
    times = timed_in_turn(calls, device, repeats, warm_up=3)
    return statistics.median(times["student"]) / statistics.median(times["teacher"])
