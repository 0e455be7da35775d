"""A recipe for a folder of pictures: what is in it, a network that takes it, and steps for the minutes that are given.

The rules are those that made the shipped recipe digits-dm: half of the time for the teacher, for without a good one
nothing else matters; students at a learning rate that falls with their steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from msdcli import nets
from msdcli.data import survey
from msdcli.data.folder import PictureFiles, refusal
from msdcli.data.survey import Survey
from msdcli.diffusion.denoiser import Denoiser
from msdcli.engine import estimate, timing
from msdcli.engine.distributed import device
from msdcli.engine.tracking.formatting import plural, roughly
from msdcli.engine.train.counting import forward_flops, num_parameters
from msdcli.errors import UserError
from msdcli.nets.meta import on_meta
from msdcli.recipe.data import FolderSettings
from msdcli.recipe.networks import UNetSettings
from msdcli.recipe.solver import SolverSettings
from msdcli.recipe.stages import DmSettings, EdmSettings

LARGEST = 64  # pixels: what the U-Net here is made for
NEARLY_ALL = 0.9  # of the pictures: the size of so many is that of the data
MULTIPLE = 8  # of a side: three levels of a U-Net halve it twice, and four a fourth time where it is large
# Patch, channels of the first level and blocks of each, from the least that learns pictures to what fills a GPU. For
# all but small pictures patches are the cheaper start (recipe `folder28`), and single pixels come with 32 channels.
SMALL = ((1, 8, 1), (1, 12, 1), (1, 16, 1), (1, 24, 1))
PATCHED = ((4, 16, 1), (4, 32, 1), (2, 16, 1), (2, 24, 1), (2, 32, 1))
LADDER = ((1, 32, 1), (1, 32, 2), (1, 48, 2), (1, 64, 2), (1, 96, 2), (1, 128, 2))
PATCHES_FROM = 24  # pixels of a side
BATCH = 64
ENOUGH = 2500  # the teacher's steps below which a larger network is no gain
LEAST = 50  # a student's steps, below which fewer students are made
FEWEST_STEPS, FEWEST_SAMPLES = 200, 256  # of a teacher: fewer teach nothing
TOO_LONG = 1.25  # times what was asked for: more is said, for it could not be met
TEACHER, SAMPLES, STUDENTS = 0.5, 0.15, 0.25  # parts of the time; the rest is the classifier's and the measurements'
# Images held out of training: a distance to fewer says little, one to more is hardly surer.
FEWEST_HELD_OUT, MOST_HELD_OUT = 500, 10_000


@dataclass(frozen=True)
class Proposal:
    """A recipe as commented YAML, what was seen, what was assumed, and the minutes that its parts will take here."""

    text: str
    seen: Survey
    assumed: list[str]
    cautions: list[str]
    minutes: dict[str, float]


def propose(folder: str, *, minutes: float, students: int | None = None, on: str = "auto") -> Proposal:
    """Look at the pictures in a folder (or zip, npz, shards) and write a recipe for them. UserError where none can be
    used.
    """
    data, seen, assumed = _data(folder)
    if students is not None and students > len(seen.class_names):
        raise UserError(
            f"{students} students are more than the {plural(len(seen.class_names), 'class', 'classes')} "
            f"({len(seen.class_names)}): each owns one at least"
        )
    where = device.resolve(on)
    plan = _Budget.of(data, seen, students, minutes, where)
    if (patch := plan.network.patch) > 1:
        assumed.append(
            f"the network sees squares of {patch}x{patch} pixels at once, for the time that is given (patch)"
        )
    assumed.append(plan.cost())
    return Proposal(_written(data, seen, plan, assumed), seen, assumed, plan.cautions(), plan.minutes())


# The data.


def _data(folder: str) -> tuple[FolderSettings, Survey, list[str]]:
    """Return the section of the data, what the pictures are like under it, and what was assumed."""
    assumed: list[str] = []
    lying = FolderSettings(path=folder)
    try:
        pictures = PictureFiles(lying)
    except UserError as error:
        if "gives no classes" not in error.message:
            raise
        lying = FolderSettings(path=folder, labels=False)
        pictures = PictureFiles(lying)
        assumed.append("the pictures lie in no folders of classes: one class for all (labels: false)")
    first = survey.survey(pictures)
    if not first.sizes:
        raise refusal(lying, first.bad, of=first.looked_at)
    chosen, why = _fitted(first)
    changed = {"channels": 1 if first.grey == sum(n for _, n in first.sizes) else 3, **chosen}
    data = FolderSettings(**(lying.model_dump() | changed))
    data, seen, used = usable(data)
    mirror = "pictures are not mirrored: `mirror: true` where left and right do not matter"
    return data, seen, [*why, *assumed, *used, mirror]


def usable(data: FolderSettings) -> tuple[FolderSettings, Survey, list[str]]:
    """Look at pictures as a section has them; return it without those that cannot be used and with some held out, what
    is left, and what was assumed.
    """
    seen, assumed = survey.survey(PictureFiles(data)), list[str]()
    if seen.bad:
        data = data.model_copy(update={"on_bad": "skip"})
        assumed.append("pictures that cannot be used are left out (on_bad: skip)")
    share, kept = _held_out(seen)
    if share is not None:
        data = data.model_copy(update={"held_out": share})
        seen = replace(seen, held_out=round(share * seen.pictures))
    return data, seen, [*assumed, kept]


def _held_out(seen: Survey) -> tuple[float | None, str]:
    """Choose the part of the pictures that is held out, where a tenth of them is enough to measure by."""
    if seen.pictures < 10 * FEWEST_HELD_OUT:
        return None, (
            "all pictures are trained on, and distances are measured against the same ones: they are too few to spare "
            "any (`held_out: 0.1` keeps a tenth of every class out of training)"
        )
    share = float(f"{min(0.1, MOST_HELD_OUT / seen.pictures):.2g}")
    return share, f"{share:g} of every class is held out of training, to measure distances against (held_out)"


def _fitted(seen: Survey) -> tuple[dict[str, object], list[str]]:
    """Choose a side that the network takes, and how pictures get it."""
    sides = sorted(min(size) for size, n in seen.sizes for _ in range(n))
    usual, square = sides[len(sides) // 2], all(width == height for (width, height), _ in seen.sizes)
    (width, height), most = seen.sizes[0]
    if most >= NEARLY_ALL * len(sides) and width == height <= LARGEST:  # those of other sizes are exceptions
        side = -(-usual // MULTIPLE) * MULTIPLE
        if side == usual:
            return {"size": side}, []
        return {"size": side, "pad": "edge"}, [
            f"{usual}x{usual} pictures are filled up to {side}x{side} with their border's pixels: a U-Net halves the "
            "side several times (pad: edge; or black, white)"
        ]
    side = max(MULTIPLE, min(LARGEST, usual // MULTIPLE * MULTIPLE))
    why = f"pictures are scaled to {side}x{side} (resize: box)"
    why += f"; larger ones than {LARGEST}x{LARGEST} want a GPU and a network of your own" if usual > LARGEST else ""
    cut = [] if square else ["the central square is cut out of pictures that are not square (crop: true)"]
    return {"size": side, "resize": "box", "crop": not square}, [*cut, why]


# The network and the steps.


@dataclass(frozen=True)
class _Budget:
    """A network, and how many steps and samples of it the minutes buy at the speed that was measured."""

    network: UNetSettings
    students: int
    sigma_data: float
    teacher_steps: int
    student_steps: int
    samples: int
    solver: SolverSettings
    parameters: int
    batch: int
    seconds: dict[str, float]
    asked: float
    device: str

    @classmethod
    def of(cls, data: FolderSettings, seen: Survey, students: int | None, minutes: float, on: torch.device) -> _Budget:
        shape, classes = (data.channels, data.size or 0, data.size or 0), len(seen.class_names)
        sigma_data = round(max(0.05, seen.deviation or 0.5), 2)
        solver = SolverSettings(name="deis", order=3, steps=18)

        def built(settings: UNetSettings) -> Denoiser:
            return nets.build(settings, shape=shape, num_classes=classes, sigma_data=sigma_data)

        measuring = timing.classifier_seconds(shape, classes, on) + timing.table_seconds(classes, students or 5)
        left = 60 * minutes - measuring
        network, *candidates = _networks(shape[1])
        for larger in candidates:
            if TEACHER * left / _step_seconds(EdmSettings(steps=1, batch=BATCH), built(larger), on) < ENOUGH:
                break
            network = larger
        net = built(network).requires_grad_(False)
        step = _step_seconds(EdmSettings(steps=1, batch=BATCH), net, on)
        update = _step_seconds(DmSettings(steps=1, batch=BATCH, fake_batch="shared"), net, on)
        flops = float(forward_flops(net))
        sample = solver.evaluations * flops / timing.evaluation_rate(net, on, flops, BATCH)
        for batch in (BATCH, BATCH // 2, BATCH // 4):  # smaller ones where not even the fewest steps fit
            part = batch / BATCH
            least = {"teacher": FEWEST_STEPS * step * part, "samples": FEWEST_SAMPLES * sample}
            least["students"] = (students or 1) * LEAST * update * part
            if sum(least.values()) <= left:
                break
        step, update = step * part, update * part
        buys = _shared(left, {"teacher": TEACHER, "samples": SAMPLES, "students": STUDENTS}, least)
        teacher_steps = max(FEWEST_STEPS, rounded(min(100_000, buys["teacher"] / step)))
        samples = max(FEWEST_SAMPLES, rounded(min(10_000, buys["samples"] / sample)))
        updates = buys["students"] / update
        students = students or max(1, min(5, classes, int(updates / LEAST)))
        student_steps = max(LEAST, rounded(min(5000, updates / students)))
        seconds = {
            "teacher": teacher_steps * step,
            "its samples": samples * sample,
            plural(students, "student", "students"): students * student_steps * update,
            "measuring": measuring + samples * sample / solver.evaluations,
        }
        return cls(
            *(network, students, sigma_data, teacher_steps, student_steps, samples, solver),
            *(num_parameters(net), batch, seconds, minutes, str(on)),
        )

    def minutes(self) -> dict[str, float]:
        return {name: seconds / 60 for name, seconds in self.seconds.items()}

    def cost(self) -> str:
        """Say how long the run takes."""
        parts = ", ".join(f"{name} {roughly(seconds)}" for name, seconds in self.seconds.items())
        return f"about {roughly(sum(self.seconds.values()))} on this device ({self.device}, measured here): {parts}"

    def cautions(self) -> list[str]:
        """Say where the minutes could not be met, or are too few for a good teacher."""
        asked, total, found = roughly(60 * self.asked), sum(self.seconds.values()), list[str]()
        if total > TOO_LONG * 60 * self.asked:
            found.append(
                f"{asked} cannot be met here: the shortest run is about {roughly(total)}, of the smallest network "
                f"and batch, {self.teacher_steps} steps of the teacher, {self.student_steps} of each student, "
                f"{self.samples} samples, and {roughly(self.seconds['measuring'])} for what measures it: a classifier, "
                "whose steps are fixed"
            )
        if self.teacher_steps < ENOUGH:
            found.append(
                f"{roughly(max(total, 60 * self.asked))} is short: the teacher gets {self.teacher_steps:,} steps of a "
                "small network, and may not be fit to be distilled; msd says so before it trains students"
            )
        return found


def _step_seconds(stage: EdmSettings | DmSettings, net: Denoiser, on: torch.device) -> float:
    """Seconds of a step of a stage with a network, as the teacher's or a student's."""
    teacher = None if isinstance(stage, EdmSettings) else net.to(on)
    with on_meta():
        like = nets.build_like(net.settings, net)
        cost = estimate.stage_cost(stage, like, None if teacher is None else like)
    return timing.stage_seconds(stage, net.to(on), teacher, cost, on)


def _shared(left: float, shares: dict[str, float], least: dict[str, float]) -> dict[str, float]:
    """Share out the seconds that are left so that each part has its least, and else its share of the rest."""
    given, free = dict[str, float](), dict(shares)
    while free:
        rest = (left - sum(given.values())) / (sum(free.values()) + 1 - sum(shares.values()))
        if not (short := [name for name, share in free.items() if share * rest < least[name]]):
            return given | {name: share * rest for name, share in free.items()}
        given |= {name: least[name] for name in short}
        free = {name: share for name, share in free.items() if name not in short}
    return given


def _networks(side: int) -> Iterator[UNetSettings]:
    """Yield networks for pictures of a side, from the cheapest on."""
    for patch, channels, blocks in (*(SMALL if side < PATCHES_FROM else PATCHED), *LADDER):
        seen = side // patch
        multipliers = [1, 2] if seen <= 8 else [1, 2, 2] if seen < 48 else [1, 2, 2, 2]
        while seen % 2 ** (len(multipliers) - 1):
            multipliers.pop()
        lowest = seen // 2 ** (len(multipliers) - 1)
        attention = [lowest] if channels >= 32 and seen > 8 else []
        yield UNetSettings(channels=channels, multipliers=multipliers, blocks=blocks, patch=patch, attention=attention)


def rounded(number: float) -> int:
    """Round to two digits, as a person would."""
    unit = 10 ** max(0, int(math.log10(max(number, 1))) - 1)
    return int(number // unit * unit)


# The file.


def _written(data: FolderSettings, seen: Survey, plan: _Budget, assumed: list[str]) -> str:
    network = plan.network
    patch = f", patch: {network.patch}" if network.patch > 1 else ""
    shard = max(1, min(1024, -(-plan.samples // 4)))
    return "\n".join(
        [
            *_header(data, seen, plan, assumed),
            "seed: 0",
            "data:",
            *data_section(data),
            "teacher:  # the diffusion model that the students are made from, trained on these pictures",
            f"  network: {{kind: unet, channels: {network.channels}, multipliers: {network.multipliers}, "
            f"blocks: {network.blocks}{patch}, attention: {network.attention}}}  # {plan.parameters:,} parameters",
            f"  sigma_data: {plan.sigma_data}  # the pictures' standard deviation",
            f"  training: {{steps: {plan.teacher_steps}, batch: {plan.batch}, lr: 1e-3, "
            f"ema: {_ema(plan.teacher_steps)}, warmup: {min(100, plan.teacher_steps // 10)}}}",
            f"  solver: {{name: {plan.solver.name}, order: {plan.solver.order}, steps: {plan.solver.steps}}}",
            f"partition: {{method: consecutive, students: {plan.students}}}  # who gets which classes: msd partition",
            f"pairs: {{count: {plan.samples}, shard: {shard}}}  # the teacher's samples that students are held to",
            "stages:",
            "  - objective: dm  # distribution matching: a one-step student",
            f"    steps: {plan.student_steps}",
            f"    batch: {plan.batch}",
            f"    lr: {min(2e-3, max(1e-4, 0.2 / plan.student_steps)):.1e}",
            "    betas: [0.5, 0.999]",
            "    fake_updates: 5",
            "    fake_batch: shared",
            f"    sigma_init: {5 * plan.sigma_data:.2g}",
            f"evaluation: {{samples: {plan.samples}}}",
            "",
        ]
    )


def _header(data: FolderSettings, seen: Survey, plan: _Budget, assumed: list[str]) -> Iterator[str]:
    count = len(seen.class_names)
    yield (
        f"# Shows: {plan.students} one-step {plural(plan.students, 'student')} of {data.label}, "
        f"{seen.pictures:,} pictures in {count:,} {plural(count, 'class', 'classes')}."
    )
    yield f"# Costs: {plan.cost()}."
    yield f"# Measured: not yet. Written by `msd recipes new` on {time.strftime('%Y-%m-%d')}; what it saw and assumed:"
    for line in [*seen.lines(), *seen.remarks(), *assumed, *plan.cautions()]:
        yield f"# - {line}"


def data_section(data: FolderSettings) -> Iterator[str]:
    """Yield the keys that are not as they would be without saying."""
    usual = FolderSettings(path=data.path, size=1)
    yield "  name: folder"
    for key, value in data.model_dump(mode="json").items():
        if key == "path":
            yield f"  path: {scalar(value)}"
        elif key != "name" and value != getattr(usual, key):
            yield f"  {key}: {str(value).lower() if isinstance(value, bool) else value}"


def scalar(text: str) -> str:
    """Return a text as YAML takes it, in quotes where it must be."""
    import yaml

    return str(yaml.safe_dump(text, width=10**6, default_style=None if Path(text).name.isalnum() else '"')).split("\n")[
        0
    ]


def _ema(steps: int) -> float:
    """A tenth of the steps or so is what is averaged."""
    return round(min(0.9999, max(0.98, 1 - 12 / steps)), 4)
