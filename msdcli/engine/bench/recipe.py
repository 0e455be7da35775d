"""How fast a recipe trains and samples on this machine, part by part, beside the same networks in plain eager float32.

Weights and images are random: neither teacher nor data need to be here. Paths are run in turn, so that what else the
machine does meets all of them; ratios are medians over the repeats, with the least and the greatest.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from msdcli import nets
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.float32 import fast_float32, fast_name
from msdcli.diffusion.guidance import Guided
from msdcli.engine import estimate, pipeline
from msdcli.engine.bench import sampling as bench_sample
from msdcli.engine.bench.clock import peak_flops, ratios
from msdcli.engine.distributed import device
from msdcli.engine.inputs import dataset
from msdcli.engine.sample import Students
from msdcli.engine.tracking.events import Report
from msdcli.engine.tracking.formatting import named_students
from msdcli.engine.train import compiling, precision
from msdcli.engine.train.counting import forward_flops, num_parameters, turn_bytes
from msdcli.engine.train.student import with_teachers
from msdcli.engine.train.trial import Mode, RandomDraws, StageTrainer, resized
from msdcli.nets.adapters import AdaptedDenoiser
from msdcli.recipe import Recipe
from msdcli.recipe.stages import GeneratorSettings, StageSettings

EAGER = "float32"
HOPELESS = 0.5  # of plain float32's speed, where bfloat16 is emulated: an update would take minutes
LAUNCH_BOUND, WELL_USED = 0.75, 0.5


@fast_float32()
def bench(
    recipe: Recipe,
    report: Report,
    *,
    repeats: int = 5,
    batch: int | None = None,
    graphs: bool = False,
    by_onnx: Callable[[Students], Students] | None = None,
) -> dict[str, Any]:
    """Measure every stage of a recipe, and sampling. `batch` replaces the stages' own, which on a CPU are
    otherwise cut to what takes a few seconds. With `graphs` compiled networks run with CUDA graphs and without.
    `by_onnx` gives students that ONNX Runtime evaluates: then they are timed too.
    """
    on = device.prepare(recipe)
    data = dataset.look(recipe, planning=True)
    frozen, described = pipeline.networks_on_meta(recipe, data, planning=True)
    teacher = build(frozen, on)
    chosen, reason, others = settle(recipe, teacher, on)
    report(reason)
    result: dict[str, Any] = {
        "recipe": recipe.name,
        "device": device.name_of(on),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": chosen,
        "float32": fast_name(on),
        "parameters": {"teacher": num_parameters(teacher), "student": num_parameters(described[0])},
        "peak_flops": {name: peak_flops(name, on) for name in dict.fromkeys([chosen, *others])},
        "stages": [],
        "sizes": [],
    }
    last = recipe.stages[-1]
    assert isinstance(last, GeneratorSettings), "checked with the recipe"
    for numbers, net in zip(recipe.sizes, described, strict=True):
        student, whose = build(net, on), "" if len(described) == 1 else f"{named_students(numbers)}, "
        how: dict[str, Any] = {"repeats": repeats, "batch": batch, "graphs": graphs}
        stages = bench_stages(recipe, teacher, student, on, (chosen, others), report, whose, **how)
        for measured in stages:
            measured |= {"students": [*numbers], "bound_by": bound(measured, result["peak_flops"][chosen], chosen)}
        result["stages"] += stages
        report(f"{whose}sampling")
        size = min(batch or fitting_batch(last, student, on), recipe.evaluation.batch)
        sampling = bench_sample.measure(student, tuple(last.sigmas), on, batch=size, by_onnx=by_onnx)
        share = estimate.share_of(recipe, numbers)
        own = {"students": [*numbers], "share": share, "parameters": num_parameters(student), "sampling": sampling}
        result["sizes"].append(own)
    result["sampling"] = result["sizes"][0]["sampling"]
    return result | {"latency_seconds": latency(result["sizes"])}


def latency(sizes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the seconds of a request of one image: the mean over classes, and that of the slowest students."""
    seconds = [(size["share"], size["sampling"]["latency_seconds"]) for size in sizes]
    return {"mean": sum(share * s for share, s in seconds), "worst": max(s for _, s in seconds)}


def bench_stages(
    recipe: Recipe,
    teacher: Denoiser,
    student: Denoiser,
    on: torch.device,
    precisions: tuple[str, list[str]],
    report: Report,
    whose: str,
    *,
    repeats: int,
    batch: int | None,
    graphs: bool,
) -> list[dict[str, Any]]:
    """Measure every stage of students of one network; of the `precisions` the first one is the run's."""
    (chosen, others), found = precisions, list[dict[str, Any]]()
    for stage, own_teacher in with_teachers(recipe.stages, student, teacher):
        size = batch or fitting_batch(stage, student, on)
        report(f"{whose}{stage.objective}: {repeats} repeats at batch {size}")
        trainer = StageTrainer(resized(stage, size), own_teacher, student, on, recipe.micro_batch, report)
        compared = modes(recipe, chosen, on, others, graphs=graphs)
        compiled = any(mode.compiled for mode in compared)
        with compiling.never_eagerly() if compiled else nullcontext():  # or its figures would be another mode's
            figures = bench_stage(trainer, compared, RandomDraws(student, size, on), repeats=repeats, report=report)
        flops = estimate.stage_cost(trainer.stage, meta(student), meta(own_teacher), recipe.micro_batch).flops
        for figure in figures.values():
            figure["images_per_second"] = size / figure["seconds"]["update"]
            figure["flops_per_second"] = flops / figure["seconds"]["update"]
        pay = graphs and compiling.waits_for_launches(meta(student), trainer.passes.images)
        own = next((mode for mode in compared if mode.compiled and mode.graphs in (None, pay)), Mode(chosen))
        trainer.enter(own)
        measured: dict[str, Any] = {
            "objective": stage.objective,
            "batch": size,
            "micro_batch": trainer.passes.images,
            "flops_per_update": flops,
            "own": own.name,
        }
        measured |= {"modes": figures, "half_batch": half_batch(trainer, student, repeats=repeats)}
        found.append(measured)
    return found


def settle(recipe: Recipe, teacher: Denoiser, on: torch.device) -> tuple[str, str, list[str]]:
    """Return the precision that a run of the recipe would take here, why, and what is worth comparing it with."""
    if recipe.precision != "auto":
        return recipe.precision, f"precision: {recipe.precision} (the recipe's)", [EAGER, "bf16"]
    choice = precision.choose(recipe, teacher, on)
    hopeless = choice.get("ratio", 1.0) < HOPELESS
    return choice["chosen"], precision.said(choice), [EAGER] if hopeless else [EAGER, "bf16"]


def build(described: Denoiser, on: torch.device) -> Denoiser:
    """Return a network like one without memory, with random weights on the device."""
    if isinstance(described, Guided):
        guide = None if described.guide is None else build(described.guide, on)
        return described.over(build(described.plain, on), guide)
    with torch.device(on):
        net = nets.build_like(described.settings, described)
    if isinstance(described, AdaptedDenoiser):
        net = AdaptedDenoiser(net.to(on), described.adapter)
    net = net.to(on).requires_grad_(False).eval()
    return net if on.type == "meta" else precision.with_prompts(net)


def fitting_batch(stage: StageSettings, student: Denoiser, on: torch.device) -> int:
    """The stage's batch; on a CPU what an evaluation of the student needs 5e10 operations for."""
    if on.type == "cuda":
        return stage.batch
    with torch.device("meta"):
        flops = forward_flops(copy.deepcopy(student).to("meta"))
    return max(1, min(stage.batch, int(5e10 / flops)))


def modes(recipe: Recipe, chosen: str, on: torch.device, plain: list[str], *, graphs: bool = False) -> list[Mode]:
    """Return what is compared: the precisions as they are, and the recipe's own, compiled on a GPU or where it asks
    for it; with `graphs` without CUDA graphs and with them.
    """
    compiled = recipe.compile is True or (on.type == "cuda" and recipe.compile == "auto")
    ways = (False, True) if graphs else (None,)
    return [*map(Mode, plain), *(Mode(chosen, compiled=True, graphs=way) for way in ways if compiled)]


def bench_stage(
    trainer: StageTrainer, compared: list[Mode], draws: RandomDraws, *, repeats: int, report: Report
) -> dict[str, Any]:
    """Measure a stage in every mode in turn; the first round warms up, and compiles."""
    seconds: dict[str, list[dict[str, float]]] = {mode.name: [] for mode in compared}
    memory: dict[str, int] = {}
    for repeat in range(-1, repeats):
        for mode in compared:
            trainer.enter(mode)
            if trainer.on.type == "cuda":
                torch.cuda.reset_peak_memory_stats(trainer.on)
            took = trainer.update(draws)
            if repeat >= 0:
                seconds[mode.name].append(took)
            elif mode.compiled:
                report(f"compiled in {took['update']:.0f} s at most")
            if trainer.on.type == "cuda":
                memory[mode.name] = torch.cuda.max_memory_allocated(trainer.on)
    figures: dict[str, Any] = {}
    for mode in compared:
        trainer.enter(mode)
        figures[mode.name] = {
            "seconds": medians(seconds[mode.name]),
            "parts": {} if mode.compiled else medians([trainer.parts(draws) for _ in range(2)]),
            "ratio": ratio(seconds[EAGER], seconds[mode.name]),
            "cpu_ratio": ratio(seconds[EAGER], seconds[mode.name], of="CPU time") if trainer.on.type == "cpu" else None,
            "memory_bytes": memory.get(mode.name) or counted_bytes(trainer, draws),
        }
    if trainer.on.type == "cuda":  # beside what the card says, for whoever trusts a plan
        trainer.enter(Mode(EAGER))
        figures[EAGER]["counted_bytes"] = counted_bytes(trainer, draws)
    return figures


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def ratio(plain: list[dict[str, float]], other: list[dict[str, float]], *, of: str = "update") -> dict[str, float]:
    """How many times faster an update is than in plain float32: of the repeats, which were taken in turn."""
    return ratios([row[of] for row in plain], [row[of] for row in other])


def meta(net: Denoiser) -> Denoiser:
    """Return a network without memory, like one that has it."""
    return build(net, torch.device("meta"))


def counted_bytes(trainer: StageTrainer, draws: RandomDraws) -> int:
    """Weights, moments and average, and the most that a turn takes at once: counted, where the device does not tell."""
    own = draws.passes(trainer.passes.images)
    most = max(
        turn_bytes(trainer.objective, names, losses[0], own[0], passes=len(own))
        for names, losses in trainer._kinds().items()
    )
    networks = [*vars(trainer.objective).values(), *trainer.objective.nets.values(), trainer.ema.net]
    weights = {p.data_ptr(): p.nbytes for n in networks if isinstance(n, nn.Module) for p in n.parameters()}
    moments = [t.nbytes for o in trainer.optimizers.values() for s in o.state.values() for t in s.values()]
    total: int = most + sum(weights.values()) + sum(moments)
    return total


def half_batch(trainer: StageTrainer, student: Denoiser, *, repeats: int) -> float | None:
    """Return the time of an update of half a pass's images as a share of that of all; None for a pass of one."""
    whole, seconds = trainer.passes.images, dict[int, list[float]]()
    if whole < 2:
        return None
    for repeat in range(-1, max(2, repeats // 2)):
        for n in (whole // 2, whole):
            took = trainer.update(RandomDraws(student, n, trainer.on))["update"]
            if repeat >= 0:
                seconds.setdefault(n, []).append(took)
    return min(seconds[whole // 2]) / min(seconds[whole])


def bound(measured: dict[str, Any], peak: float, chosen: str) -> str:
    """Say in one sentence what bounds the mode that a run takes."""
    own = measured["modes"][measured["own"]]
    parts = own["parts"] or measured["modes"][chosen]["parts"]
    share = own["flops_per_second"] / peak
    largest = max(parts, key=lambda part: parts[part])
    if (measured["half_batch"] or 0) > LAUNCH_BOUND:
        what = "launches and fixed costs: half the batch takes nearly as long, so a larger one is nearly free"
    elif share > WELL_USED:
        what = "arithmetic: convolutions and matrix products run near what the device multiplies"
    else:
        what = "memory traffic and narrow kernels: the time grows with the batch, and the multipliers wait"
    most = f"{largest} takes {parts[largest] / sum(parts.values()):.0%}"
    return f"{what} ({share:.0%} of the {chosen} peak; {most})"
