"""A recipe for a teacher that is there: what it makes, and of which conditions, is read from its files."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from msdcli.data import survey
from msdcli.data.base import Dataset
from msdcli.data.folder import PictureFiles, refusal
from msdcli.data.survey import Survey
from msdcli.diffusion.denoiser import Denoiser
from msdcli.engine import estimate, pipeline, timing
from msdcli.engine.checkpoints.model import MODEL
from msdcli.engine.inputs import autoencoder as autoencoders
from msdcli.engine.inputs import hub, importing
from msdcli.engine.proposal import LEAST, data_section, rounded, scalar, usable
from msdcli.engine.tracking.formatting import counted, roughly
from msdcli.engine.train.counting import num_parameters
from msdcli.errors import UserError
from msdcli.nets.diffusers.building import log_sigmas
from msdcli.nets.diffusers.files import is_pipeline
from msdcli.recipe import Recipe, of_text
from msdcli.recipe.data import FolderSettings
from msdcli.recipe.networks import DiffusersNetworkSettings, EdmNetworkSettings

TEXTS = (".txt", ".jsonl", ".json")
STEPS, SAMPLES = 5000, 10_000  # of a student, and of the teacher, where this machine's minutes set no other number
FEWEST_SAMPLES = 256
SAMPLED, TRAINED = 0.3, 0.6  # parts of the time; the rest is that of the measurements' samples
LARGE = 20_000_000  # parameters above which published recipes learn at 1e-5 and less, and a device takes few images
GUIDANCE = {"sd": 1.75, "sdxl": 8.0, "sd3": 7.0}  # DMD2's scripts; of SD3 its pipeline's own


@dataclass(frozen=True)
class TeacherProposal:
    """A recipe as commented YAML, what was found out about the teacher and the pictures, and what was assumed."""

    text: str
    found: list[str]
    assumed: list[str]
    minutes: dict[str, float]  # of its parts on this machine; empty where nobody can say
    pictures: Survey | None = None


@dataclass(frozen=True)
class _Known:
    """What a teacher's files say: the network without memory, and the shape of the pictures that it ends in."""

    path: str
    net: Denoiser
    shape: tuple[int, ...]
    latent: bool

    @classmethod
    def of(cls, path: str) -> _Known:
        folder = hub.resolve(path)
        if not folder.exists():
            raise UserError(f"no teacher at {path}", hint="msd docs teacher says what is read")
        net, autoencoder = importing.inspect(folder), importing.find_autoencoder(folder)
        shape = tuple(net.shape)
        if autoencoder is not None:
            made = autoencoders.read_geometry(autoencoder)
            shape = (made.image_channels, shape[1] * made.factor, shape[2] * made.factor)
        return cls(path, net, shape, autoencoder is not None)

    @property
    def large(self) -> bool:
        return num_parameters(self.net) >= LARGE

    @property
    def classes(self) -> int:
        """How many classes there are to divide: a teacher without any has one for all."""
        return max(1, self.net.num_classes)

    def line(self) -> str:
        count = self.net.num_classes
        knows = "prompts" if self.net.reads_text else counted(count, "class", "classes") if count else "no classes"
        kind = f", from latents of {list(self.net.shape)}" if self.latent else ""
        return f"{self.path} makes {list(self.shape)}{kind}, knows {knows}, {num_parameters(self.net):,} parameters"

    def levels(self) -> tuple[float, float] | None:
        """The noise levels of the schedule that it learnt by, as a solver takes them; None: those of EDM."""
        settings = self.net.settings
        if not isinstance(settings, DiffusersNetworkSettings) or not len(table := log_sigmas(settings).exp()):
            return None
        return float(table[0]), float(table[-1])

    def first_level(self) -> float:
        """Where a one-step student begins: where nothing of an image is left."""
        if (levels := self.levels()) is not None:
            return levels[1]
        published = isinstance(self.net.settings, EdmNetworkSettings | DiffusersNetworkSettings)
        return 80.0 if published else float(f"{5 * self.net.sigma_data:.2g}")


def is_teacher(path: str) -> bool:
    """Whether a path is a model and no pictures: what `teacher.path` takes."""
    place = Path(path)
    if hub.is_hub(path) or (place.is_file() and place.suffix == ".pkl"):
        return True
    return place.is_dir() and (is_pipeline(place) or (place / MODEL).is_file())


def propose(
    teacher: str, pictures: str | None, *, name: str, minutes: float, students: int | None = None, on: str = "auto"
) -> TeacherProposal:
    """Write a recipe for a teacher, with pictures (or a file of prompts) or without any; it has been validated, and
    its networks built without memory. UserError where there can be none.
    """
    known = _Known.of(teacher)
    data, seen, assumed = _data(known, pictures)
    students = students or (4 if known.net.reads_text else min(known.classes, 4))
    if not known.net.reads_text and students > known.classes:
        raise UserError(f"{students} students are more than the classes ({known.classes}): each owns one at least")
    plan = _Written(known, data, name, students, STEPS, SAMPLES, seen is not None)
    seconds, why_not = _seconds(*_checked(plan.body(), name, on))
    if why_not is None:
        drawn, learnt, fixed = (seconds.get(part, 0.0) for part in ("its samples", "students", "measuring"))
        left = max(60 * minutes - fixed, 15 * minutes)
        plan = replace(
            plan,
            samples=max(FEWEST_SAMPLES, rounded(SAMPLES * min(1.0, SAMPLED * left / max(drawn, 1e-9)))),
            steps=max(LEAST, rounded(STEPS * min(1.0, TRAINED * left / max(learnt, 1e-9)))),
        )
        seconds = seconds | {
            "its samples": drawn * plan.samples / SAMPLES,
            "students": learnt * plan.steps / STEPS,
        }
        took = {part: value for part, value in seconds.items() if value >= 1}
        parts = ", ".join(f"{part} {roughly(value)}" for part, value in took.items())
        costs = f"about {roughly(sum(seconds.values()))} on this machine" + (f": {parts}" if parts else "")
        _checked(plan.body(), name, on)
    else:
        seconds, costs = {}, f"not measured here ({why_not}); msd distill {name}.yaml --dry-run counts operations"
    assumed += plan.assumed()
    found = [known.line(), *([] if seen is None else [*seen.lines(), *seen.remarks()])]
    text = "\n".join([*plan.header(costs, [*found, *assumed]), *plan.body(), ""])
    return TeacherProposal(text, found, assumed, {k: v / 60 for k, v in seconds.items()}, seen)


def _data(known: _Known, pictures: str | None) -> tuple[list[str], Survey | None, list[str]]:
    """Return the lines of the section `data`, what the pictures are like under it, and what was assumed."""
    is_text = pictures is not None and pictures.lower().endswith(TEXTS)
    if known.net.reads_text:
        if pictures is None or not is_text:
            raise UserError(
                f"the teacher at {known.path} reads prompts, and there are none to distil it by",
                hint=f"msd recipes new prompts.txt --teacher {known.path}, with a prompt in every line (or .jsonl, "
                ".json of captions)",
            )
        return ["data:", "  name: prompts", f"  path: {scalar(pictures)}"], None, []
    if pictures is None:
        return [], None, []
    if is_text:
        raise UserError(f"{pictures} holds texts, and the teacher at {known.path} reads none", hint="a folder instead")
    if len(known.shape) != 3:
        raise UserError(
            f"the teacher at {known.path} makes {list(known.shape)}, and no pictures", hint="leave them out"
        )
    settings, seen, assumed = _pictures(known, pictures)
    if len(seen.class_names) != known.classes:
        raise UserError(
            f"{pictures} has {counted(len(seen.class_names), 'class', 'classes')}, the teacher at {known.path} "
            f"{known.classes:,}",
            hint="a folder for each class, in the teacher's order; or leave the pictures out",
        )
    if known.classes > 1:
        assumed.append(
            f"its classes are those of the folders, by name: {', '.join(seen.class_names[:4])}"
            + ", ..." * (known.classes > 4)
        )
    return ["data:", *data_section(settings)], seen, assumed


def _pictures(known: _Known, path: str) -> tuple[FolderSettings, Survey, list[str]]:
    """Bring pictures to the size and channels that the teacher makes."""
    side, assumed = known.shape[1], list[str]()
    keys = {"path": path, "size": side, "channels": known.shape[0], "labels": known.classes > 1}
    first = survey.survey(PictureFiles(FolderSettings(**keys)))  # type: ignore[arg-type]
    if not first.sizes:
        raise refusal(FolderSettings(**keys), first.bad, of=first.looked_at)  # type: ignore[arg-type]
    if any(size != (side, side) for size, _ in first.sizes):
        square = all(width == height for (width, height), _ in first.sizes)
        keys |= {"resize": "box", "crop": not square}
        assumed.append(
            f"pictures are scaled to the teacher's {side}x{side} (resize: box{', crop: true' * (not square)})"
        )
    settings, seen, used = usable(FolderSettings(**keys))  # type: ignore[arg-type]
    return settings, seen, [*assumed, *used]


def _checked(body: list[str], name: str, on: str) -> tuple[Recipe, Dataset]:
    """Read a recipe as a run would, and build what it says without memory. UserError where it is none."""
    recipe = of_text("\n".join(body), name).model_copy(update={"device": on})
    return recipe, pipeline.check(recipe, planning=True)


def _seconds(recipe: Recipe, data: Dataset) -> tuple[dict[str, float], str | None]:
    """How long the parts of a run would take here, or why nobody can say."""
    networks = pipeline.networks_on_meta(recipe, data, planning=True)
    found = timing.timing(recipe, data, *networks, estimate.estimate(recipe, data, *networks))
    return found.seconds, found.why_not


@dataclass(frozen=True)
class _Written:
    """The recipe's lines, by a teacher, the lines of its data, and numbers."""

    known: _Known
    data: list[str]
    name: str
    students: int
    steps: int
    samples: int
    measured: bool

    @property
    def pairs(self) -> bool:
        """Whether students are held to pairs: where the teacher works on pictures; DMD2 leaves them out elsewhere."""
        return not (self.known.latent or self.known.net.reads_text)

    def assumed(self) -> list[str]:
        why = (
            "students are held to pairs of the teacher's noise and sample (pairs: shared, DMD)"
            if self.pairs
            else "no pairs, which are dear with a teacher of latents: five updates of the fake network to one (DMD2)"
        )
        found = [why, f"{self._rate()} is a rate for a network of this size: half of it where a student's loss jumps"]
        if self.known.net.reads_text:
            found.append("guidance is that of published recipes: teacher.guidance.scale")
        return found

    def _rate(self) -> str:
        return (
            "lr: 1e-5" if self.known.large else f"lr: {min(1e-3, max(1e-4, 0.2 / self.steps)):.0e}".replace("e-0", "e-")
        )

    def header(self, costs: str, said: list[str]) -> Iterator[str]:
        of = "prompts" if self.known.net.reads_text else counted(self.known.classes, "class", "classes")
        yield f"# Shows: {counted(self.students, 'one-step student')} of {self.known.path}, {of} between them."
        yield f"# Costs: {costs}."
        day = time.strftime("%Y-%m-%d")
        yield f"# Measured: not yet. Written by `msd recipes new` on {day}; what it saw and assumed:"
        for line in said:
            yield f"# - {line}"
        if not self.measured:
            run = f"runs/{self.name}"
            yield "# There are no real images here, so the run ends without a distance. To have one, measure"
            yield f"# it against a folder of pictures, or published statistics: msd fid {run} PICTURES --protocol clean"

    def body(self) -> list[str]:
        known, text = self.known, self.known.net.reads_text
        method = "consecutive" if not text else "quadrants" if self.students == 4 else "kmeans"
        levels = known.levels()
        span = "" if levels is None else f", sigma_min: {levels[0]:.4f}, sigma_max: {levels[1]:.4f}"
        pairs = f"pairs: {{count: {self.samples}, shard: {max(1, min(1024, -(-self.samples // 4)))}}}"
        settings = known.net.settings
        form = settings.text_form if text and isinstance(settings, DiffusersNetworkSettings) else None
        return [
            "seed: 0",
            *(
                ["micro_batch: 8  # images that a device takes at once: more where there is memory"]
                if known.large
                else []
            ),
            *self.data,
            "teacher:",
            f"  path: {scalar(known.path)}",
            f"  solver: {{name: deis, order: 3, steps: 18{span}}}",
            *([] if form is None else [f"  guidance: {{scale: {GUIDANCE[form]}}}"]),
            f"partition: {{method: {method}, students: {self.students}}}  # who gets which: msd partition",
            *([f"{pairs}  # the teacher's samples that students are held to"] if self.pairs else []),
            "stages:",
            "  - objective: dm  # distribution matching: a one-step student",
            f"    steps: {self.steps}",
            "    batch: 64",
            f"    {self._rate()}",
            "    betas: [0.5, 0.999]",
            "    fake_updates: 5",
            f"    fake_batch: {'shared' if self.pairs else 'fresh'}",
            f"    sigma_init: {known.first_level():.6g}",
            *([] if self.pairs else ["    pairs: none"]),
            *([f"evaluation: {{samples: {self.samples}}}"] if self.measured else []),
        ]
