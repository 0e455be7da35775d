"""What the networks compute in while students train: bfloat16 where this device is faster at it, else float32.

Weights that learn, their gradients, optimizers and averages are float32, as are preconditioning, statistics and losses;
a frozen network's convolutions are held in bfloat16. Sampling and measuring are float32 whatever a student trained in.
What float32 means on a GPU, `diffusion/float32.py` says: TF32 for networks that train and sample.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from msdcli import nets, records
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.device_batch import DeviceBatch
from msdcli.diffusion.float32 import fast_float32
from msdcli.diffusion.guidance import Guided
from msdcli.engine.distributed.device import seeded_apart
from msdcli.engine.tracking.events import Report, silent
from msdcli.engine.train.counting import forward_flops
from msdcli.nets.diffusers.denoiser import DiffusersDenoiser
from msdcli.nets.diffusers.prompt_store import stand_in
from msdcli.nets.diffusers.text_denoiser import TextDenoiser
from msdcli.nets.meta import on_meta
from msdcli.objectives import Objective
from msdcli.recipe import Recipe
from msdcli.recipe.networks import NetworkSettings
from msdcli.rundir import RunDir, lock, write_json

# Under this many operations per image and evaluation little time goes into arithmetic, and nothing is measured: so a
# recipe of tiny networks is float32 on every machine.
TINY_FLOPS = 1e8
WORTH = 1.1  # how many times faster bfloat16 must be
SECONDS = {"cpu": 10.0, "cuda": 2.0}  # about what the measurement may take
KEY = "precision"


def resolve(run: RunDir, recipe: Recipe, teacher: Denoiser, device: torch.device, report: Report) -> Recipe:
    """Return the recipe with `precision: auto` settled; a run measures once, and keeps to what run.json says.

    This is a decision of the run and no cache: it depends on the recipe and the teacher, which cannot change in a run,
    and on the device that it was begun on, for all students of a run compute alike wherever they go on.
    """
    if recipe.precision != "auto":
        return recipe
    with lock(run.root, "the run directory", wait=report):
        known = records.run(run.record_file)
        if KEY not in known:
            known[KEY] = choose(recipe, teacher, device, report)
            write_json(run.record_file, known)
            report(said(known[KEY]))
    return recipe.model_copy(update={KEY: known[KEY]["chosen"]})


def said(choice: dict[str, Any]) -> str:
    """Return a choice as a sentence."""
    why = f"bf16 is {choice['ratio']:.2f} times as fast here" if "ratio" in choice else "the networks are tiny"
    return f"precision: {choice['chosen']} ({why})"


def choose(recipe: Recipe, teacher: Denoiser, device: torch.device, report: Report = silent) -> dict[str, Any]:
    """Measure the students' network, of several sizes the one of the most operations, forward and backward in both
    types, and say which is used and why.
    """
    asked = [recipe.student.of(numbers[0]).network_for(teacher.settings) for numbers in recipe.sizes]
    settings = max(asked, key=lambda own: evaluation_flops(own, teacher)) if len(asked) > 1 else asked[0]
    return compare(settings, teacher, recipe.stages[-1].batch, recipe.micro_batch, device, report)


def compare(
    settings: NetworkSettings,
    like: Denoiser,
    batch: int,
    micro_batch: int | None,
    device: torch.device,
    report: Report = silent,
) -> dict[str, Any]:
    """Measure the network of a section, for the images and classes of another one, in both types.

    At most `micro_batch` images of a `batch` are asked for at once, and half as many where memory is too small.
    """
    flops = evaluation_flops(settings, like)
    if flops < TINY_FLOPS:
        return {"chosen": "float32", "flops_per_image": flops}
    most = min(batch, micro_batch or batch)
    most = max(1, min(most, int((2e10 if device.type == "cpu" else 1e13) / flops)))
    net, memory = with_prompts(nets.build_like(settings, like)).to(device).train(), DeviceBatch(report)
    batch, seconds = memory.most(lambda size: measure(net, size, device), most)
    ratio = seconds["float32"] / seconds["bf16"]
    chosen = "bf16" if ratio >= WORTH else "float32"
    return {"chosen": chosen, "ratio": round(ratio, 3), "seconds": seconds, "batch": batch, "device": str(device)}


def with_prompts(net: Denoiser) -> Denoiser:
    """Give a network that reads text something to read, where it has no prompts: it is only timed."""
    if isinstance(net, TextDenoiser) and net.prompts is None:
        shape, (pooled,) = net.embedding_shapes
        net.prompts = stand_in(shape, pooled)
    return net


def measure(net: Denoiser, batch: int, device: torch.device, *, repeats: int = 5) -> dict[str, float]:
    """Return the least seconds of a forward and backward pass in each type, taken in turn within the time allowed."""
    x, sigma = torch.randn(batch, *net.shape, device=device), torch.ones(batch, device=device)
    condition = torch.zeros(batch, dtype=torch.int64, device=device)

    def once() -> None:
        net(x, sigma, condition).square().mean().backward()
        net.zero_grad(set_to_none=True)

    times: dict[str, list[float]] = {"float32": [], "bf16": []}
    end = time.perf_counter() + SECONDS.get(device.type, SECONDS["cpu"])
    with seeded_apart(device), fast_float32():
        for _ in range(1 + repeats):
            for name, seconds in times.items():
                net.compute_in(dtype(name))
                seconds.append(timed(once, device))
            if time.perf_counter() > end:
                break
    # The first round warms up; where it alone took all the time, as where bfloat16 is emulated, it has to do.
    return {name: min(seconds[1:] or seconds) for name, seconds in times.items()}


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that a call takes, with all that it started on the device."""
    synchronize(device)
    begun = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begun


def timed_in_turn(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int, *, warm_up: int = 1
) -> dict[str, list[float]]:
    """Return the seconds of every call in every repeat, after rounds that warm up. The calls take turns, so that what
    else the machine does meets all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(-warm_up, repeats):
        for name, call in calls.items():
            took = timed(call, device)
            if repeat >= 0:
                seconds[name].append(took)
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def dtype(precision: str) -> torch.dtype | None:
    """Return what networks compute in under a settled `precision`; None: in the type of their weights."""
    return torch.bfloat16 if precision == "bf16" else None


def lower(objective: Objective, precision: str, *, hold: bool = True) -> None:
    """Let the objective's networks compute in `precision`; with `hold` those that do not learn are replaced by copies
    that are held in it.
    """
    low = dtype(precision)
    if low is None:
        return
    learns = learning(objective)
    for name, net in denoisers(objective).items():
        if name in learns or not hold:
            for plain in parts(net):
                plain.compute_in(low)
        else:
            setattr(objective, name, held(net, low))


def denoisers(objective: Objective) -> dict[str, Denoiser]:
    """Return the denoisers that the objective asks, by the names of its attributes."""
    return {name: net for name, net in vars(objective).items() if isinstance(net, Denoiser)}


def learning(objective: Objective) -> dict[str, Denoiser]:
    """Return those of its denoisers that learn, whole or in part: a network with adapters holds them among others."""
    learnt = {id(p) for net in objective.nets.values() for p in net.parameters()}
    return {n: net for n, net in denoisers(objective).items() if any(id(p) in learnt for p in net.parameters())}


def parts(net: Denoiser) -> list[Denoiser]:
    """Return the networks that a denoiser asks: itself, or, of a guided one, the teacher and its guide."""
    if not isinstance(net, Guided):
        return [net]
    return [net.plain] if net.guide is None else [net.plain, net.guide]


_HELD: WeakKeyDictionary[Denoiser, Denoiser] = WeakKeyDictionary()


def held(net: Denoiser, low: torch.dtype) -> Denoiser:
    """Return a frozen network's copy that computes in `low` and holds its convolutions in it, made once.

    The network itself stays: students start from its float32 weights.
    """
    if net not in _HELD:
        _HELD[net] = _guided(net, low) if isinstance(net, Guided) else _plain(net, low)
    return _HELD[net]


def _guided(net: Guided, low: torch.dtype) -> Guided:
    guide = None if net.guide is None else held(net.guide, low)
    return net.over(held(net.plain, low), guide)


def _plain(net: Denoiser, low: torch.dtype) -> Denoiser:
    copied = copy.deepcopy(net).compute_in(low).requires_grad_(False)
    cast = (nn.Conv2d, nn.Linear) if isinstance(net, DiffusersDenoiser) else nn.Conv2d  # embeddings stay float32
    for module in copied.modules():
        if isinstance(module, cast):
            module.to(low)
    return copied


def evaluation_flops(settings: NetworkSettings, teacher: Denoiser) -> int:
    """Operations of one evaluation of one image by the network of a section."""
    with on_meta():
        return forward_flops(nets.build_like(settings, teacher))
