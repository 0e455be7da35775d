"""Samples from K students: requests are routed to the owners of their classes and come back in order."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from msdcli import records
from msdcli.data.prompts import read_lines
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.device_batch import DeviceBatch
from msdcli.diffusion.float32 import fast_float32
from msdcli.diffusion.generator import Generator, check_steps, levels_of
from msdcli.engine.checkpoints.model import MODEL, is_complete, load_model
from msdcli.engine.inputs.autoencoder import find, open_autoencoder
from msdcli.engine.inputs.importing import TEXT
from msdcli.engine.inputs.prompts import PromptRouter, attach_prompts, prompt_router_of, read_prompts
from msdcli.engine.pictures import (
    check_replaceable,
    labels_file,
    prompts_file,
    save_grid,
    save_npz,
    save_pngs,
    save_zip,
)
from msdcli.errors import UserError, WrongValueError
from msdcli.nets.diffusers.autoencoder import Autoencoder
from msdcli.noise import noises
from msdcli.outputs import check_file
from msdcli.partition import Partition, class_numbers
from msdcli.rundir import RunDir, key

BUNDLE, BASE = "bundle.json", "base"
LONGEST = 120  # letters of a file's name that say which classes it shows
BATCH = 500  # images drawn at once by students that no recipe goes with
Held = TypeVar("Held")  # a student in memory, as what evaluates it holds it
SUFFIXES = {"grid": ".png", "png": "", "zip": ".zip", "npz": ".npz", "latents": ".npz"}  # of the formats of samples


class Students:
    """K students behind one router; a student's weights are read when it is first asked.

    `autoencoder` is the folder of what makes pictures of their samples, where those are latents. At most `max_resident`
    students stay in memory (all of them if None): the one that was asked least recently goes first. Where conditions
    are prompts, `prompt_router` gives new ones their number and their student. `batch` images are drawn at once unless
    a call says otherwise, fewer where the device's memory is too small. Students that are adapters of one network have
    it in common, from the folder `base`; of those only the adapters come and go.
    """

    runtime = "torch"  # what evaluates the networks; records of samples name another one

    def __init__(
        self,
        folders: Sequence[Path],
        partition: Partition,
        class_names: list[str],
        device: torch.device,
        autoencoder: Path | None = None,
        max_resident: int | None = None,
        prompt_router: PromptRouter | None = None,
        batch: int = BATCH,
        base: Path | None = None,
    ) -> None:
        self.folders = list(folders)
        self.partition = partition
        self.class_names = class_names
        self.device = device
        self.autoencoder = autoencoder
        self.max_resident = max_resident
        self.prompt_router = prompt_router
        self.batch, self.memory = batch, DeviceBatch()
        self.base = base
        self._base: Denoiser | None = None
        self._decoder: Autoencoder | None = None
        self.steps: int | None = None  # of those that the students have; None: all
        self._loaded: dict[int, Generator] = {}

    def __repr__(self) -> str:
        conditions = f"{len(self.class_names)} classes" if self.prompt_router is None else "prompts"
        return f"Students({len(self.folders)} for {conditions}, {self.runtime} on {self.device})"

    def stop_after(self, steps: int | None) -> None:
        """Take only the first `steps` steps of every student, all if None. UserError where one has fewer."""
        if steps is not None:
            for number, folder in enumerate(self.folders):
                check_steps(steps, len(self.levels(number, records.model(folder / MODEL))))
        self.steps = steps

    def sample(
        self,
        classes: Sequence[int | str] = (),
        *,
        prompts: Sequence[str] | None = None,
        seed: int = 0,
        first: int = 0,
        batch: int | None = None,
        latents: bool = False,
    ) -> Tensor:
        """Return a sample per entry of `classes` or `prompts`, float32 [entries, *shape] on the CPU.

        Classes are numbers or names. Sample number `first + i` depends on `seed`, its number and its class or prompt
        alone. Students of a latent teacher give pictures too; with `latents`, what they make before it is decoded.
        """
        classes = class_numbers(classes, self.class_names) if prompts is None else self.numbers(prompts)
        samples: Tensor | None = None
        numbers = range(first, first + len(classes))
        for at, y in self.stream(classes, seed=seed, batch=batch, numbers=numbers, latents=latents):
            if samples is None:
                samples = torch.empty(len(classes), *y.shape[1:])
            samples[at] = y.cpu()
        if samples is None:
            raise WrongValueError("no class was asked for")
        return samples

    def numbers(self, prompts: Sequence[str]) -> list[int]:
        """Return the condition numbers of prompts. UserError where conditions are classes."""
        if self.prompt_router is None:
            raise UserError("these students know classes, not prompts", hint="--classes 3,7")
        return self.prompt_router.number(prompts)

    def route(self, conditions: Sequence[int]) -> dict[int, list[int]]:
        """Return, for every student that is needed, the positions in `conditions` that it serves."""
        if self.prompt_router is None:
            return self.partition.route(conditions)
        positions: dict[int, list[int]] = {}
        for position, condition in enumerate(conditions):
            positions.setdefault(self.prompt_router.owner_of(condition), []).append(position)
        return positions

    def name(self, condition: int) -> str:
        """Return the name of a class, or the text of a prompt."""
        return (
            self.class_names[condition]
            if self.prompt_router is None
            else self.prompt_router.name(condition, self.class_names)
        )

    @torch.no_grad()
    def stream(
        self,
        classes: Sequence[int],
        *,
        seed: int = 0,
        batch: int | None = None,
        numbers: Sequence[int] | None = None,
        latents: bool = False,
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Yield the same samples in batches, one student after the other: positions in `classes`, and float32 samples
        on the device. `numbers` are the samples' own, from 0 on if absent.
        """
        numbers, batch = range(len(classes)) if numbers is None else numbers, batch or self.batch
        known = len(self.class_names) if self.prompt_router is None else len(self.prompt_router)
        if unknown := [c for c in classes if not 0 <= c < known]:
            raise WrongValueError(f"class {unknown[0]} does not exist: there are 0 to {known - 1}")
        routed = self.route(classes)
        turns = [
            (student, positions[i : i + batch])
            for student, positions in routed.items()
            for i in range(0, len(positions), batch)
        ]
        if not turns:
            return
        shape = self.shape(turns[0][0])
        steps = {student: self.evaluations(student) for student in routed}
        batches = [([numbers[i] for i in at], steps[student]) for student, at in turns]
        drawn = noises(seed, batches, shape, ahead=self.device.type != "cpu")
        for (student, at), (z, noise) in zip(turns, drawn, strict=True):
            c = torch.tensor([classes[i] for i in at], device=self.device)
            inputs = [z, c] if noise is None else [z, c, noise]
            yield at, self.memory.map(functools.partial(self._drawn, student, latents), *inputs)

    def _drawn(self, student: int, latents: bool, z: Tensor, c: Tensor, noise: Tensor | None = None) -> Tensor:
        between = None if noise is None else noise.to(self.device)
        y = self.generate(student, z.to(self.device), c, between)
        return y if latents else self.decode(y)

    def generate(self, number: int, z: Tensor, c: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return what student `number` makes of unit noise `z` and class numbers `c`, float32; it may be latents.

        `noise` [n, steps - 1, *shape] is what a student of several steps takes between them.
        """
        with fast_float32():
            return self.student(number)(z, c, noise)

    def decode(self, y: Tensor) -> Tensor:
        """Return the pictures of a student's samples: the samples themselves, unless they are latents."""
        if self.autoencoder is None:
            return y
        if self._decoder is None:
            self._decoder = open_autoencoder(self.autoencoder, self.device)
        with fast_float32():
            return self._decoder.decode(y.to(self.device))

    def put(self, number: int, generator: Generator) -> None:
        """Use this generator as student `number`, whatever its folder holds."""
        attach_prompts(generator.net.to(self.device), self.prompt_router)
        self._loaded[number] = generator.first(self.steps)

    def student(self, number: int) -> Generator:
        """Return student `number`."""
        if number not in self._loaded:
            net, description = load_model(self.folders[number], self._base_network)
            self.put(number, Generator(net, self.levels(number, description)))
        return self.resident(self._loaded, number)

    def resident(self, loaded: dict[int, Held], number: int) -> Held:
        """Return entry `number`, the last one asked; those asked least recently go where there are too many."""
        loaded[number] = loaded.pop(number)
        while self.max_resident is not None and len(loaded) > self.max_resident:
            del loaded[next(iter(loaded))]
        return loaded[number]

    def _base_network(self) -> Denoiser:
        """Return the network that the students are adapters of, read once."""
        if self._base is None:
            if self.base is None:
                raise UserError("these students are adapters, and the network that they belong to is not here")
            self._base = attach_prompts(load_model(self.base)[0].to(self.device), self.prompt_router)
        return self._base

    def shape(self, number: int) -> tuple[int, ...]:
        """Return the shape of what student `number` makes, of its record where its weights are not here."""
        if number in self._loaded:
            return self._loaded[number].net.shape
        return tuple(records.model(self.folders[number] / MODEL)["shape"])

    def evaluations(self, number: int) -> int:
        """Return how often student `number` is evaluated per image. Its record says it: the weights may not be here."""
        if number in self._loaded:
            return self._loaded[number].steps
        levels = self.levels(number, records.model(self.folders[number] / MODEL))
        return len(levels) if self.steps is None else self.steps

    def levels(self, number: int, description: Mapping[str, Any]) -> tuple[float, ...]:
        """Return all noise levels that student `number`'s record names. UserError where it names none."""
        try:
            return levels_of(description["stage"])
        except (KeyError, TypeError, ValueError):
            folder = self.folders[number]
            raise UserError(f"{folder} is no student that makes images: its model.json names no sigmas") from None


def load(source: Path | str, device: torch.device | str = "cpu", *, steps: int | None = None) -> Students:
    """Open the students of a run directory or of an exported bundle; with `steps`, only their first ones are taken.

    UserError if they are not all finished, or have fewer steps.
    """
    root, device = Path(source), torch.device(device)
    if (root / BUNDLE).is_file():
        partition = Partition.load(root / "partition.json")
        folders = [root / "students" / str(k) for k in range(len(partition.parts))]
        record = records.read(root / BUNDLE, records.Bundle, "bundle")
        prompt_router = None
        if "embeddings" in record:
            prompt_router = PromptRouter(root / TEXT, partition, store=None, device=device, dtype=record["embeddings"])
        names = [] if prompt_router else records.class_names(root / BUNDLE, partition.num_conditions)
        base = root / BASE
        students = Students(folders, partition, names, device, find(root), prompt_router=prompt_router, base=base)
        students.stop_after(steps)
        return students
    students = of_run(RunDir(root), device)
    if waiting := [str(k) for k, folder in enumerate(students.folders) if not is_complete(folder)]:
        raise UserError(
            f"{root}: student {', '.join(waiting[:8])} is not finished", hint=f"`msd distill {root}` continues the run"
        )
    students.stop_after(steps)
    return students


def of_run(run: RunDir, device: torch.device) -> Students:
    """Return the router of a run whose students may still be in training."""
    recipe = run.recipe()
    partition = Partition.load(run.partition)
    number, last = len(recipe.stages) - 1, recipe.stages[-1]
    folders = [run.stage(k, number, last.objective) for k in range(len(partition.parts))]
    autoencoder = find(run.teacher)
    more: dict[str, Any] = {"batch": recipe.evaluation.batch, "base": run.teacher}
    if (prompt_router := prompt_router_of(run, partition, device)) is not None:
        names = read_prompts(run.prompts)
        return Students(folders, partition, names, device, autoencoder, prompt_router=prompt_router, **more)
    names = records.class_names(run.record_file, partition.num_conditions)
    return Students(folders, partition, names, device, autoencoder, **more)


# What is asked for, and where it is written.


def default_target(run: Path, format_: str, classes: Sequence[int], seed: int, *, everything: bool) -> Path:
    """Name the samples after what they are."""
    which = "all" if everything else "classes-" + "-".join(map(str, classes))
    if len(which) > LONGEST:  # file systems take names of 255 bytes
        which = f"{len(classes)}-classes-{key(*classes)}"
    name = f"{which}-seed{seed}"
    return run / "samples" / f"{name}{'.latents' if format_ == 'latents' else ''}{SUFFIXES[format_]}"


def check_target(path: Path, format_: str) -> None:
    """Raise UserError, before anything is drawn, where samples of this format would replace what is not msd's."""
    if format_ == "png":
        check_replaceable(path)
    else:
        check_file(path, SUFFIXES[format_])


def texts(given: Sequence[str], file: Path | None, number: int | None) -> list[str]:
    """Return the prompts to sample: those given and those of a file, once, or in turn until there are `number`."""
    wanted = [*given, *(read_lines(file) if file else [])]
    return [wanted[i % len(wanted)] for i in range(number or len(wanted))]


def draw(students: Students, path: Path, asked: Sequence[int], format_: str, *, seed: int, batch: int | None) -> None:
    """Sample the conditions `asked` into a file: one picture (a row per condition), a folder or a zip of PNGs with
    labels or prompts, or an .npz of pixels or of latents.
    """
    check_target(path, format_)
    prompt_router = students.prompt_router
    names = [students.name(c) for c in asked]
    if format_ in ("png", "zip"):
        drawn = students.stream(asked, seed=seed, batch=batch)
        owners = [] if prompt_router is None else [prompt_router.owner_of(c) for c in asked]
        save = save_pngs if format_ == "png" else save_zip
        how = {} if students.runtime == "torch" else {"runtime": students.runtime}
        save(path, drawn, labels_file(asked, how) if prompt_router is None else prompts_file(names, owners))
        return
    images = students.sample(asked, seed=seed, batch=batch, latents=format_ == "latents")
    if format_ == "grid":
        rows: dict[int, list[int]] = {}
        for position, condition in enumerate(asked):
            rows.setdefault(condition, []).append(position)
        save_grid(path, [images[at] for at in rows.values()], class_names=[students.name(c) for c in rows])
    else:
        save_npz(path, images, asked if prompt_router is None else names, pixels=format_ == "npz")


def prompts_target(run: Path, format_: str, prompts: Sequence[str], seed: int) -> Path:
    """Name samples of prompts: a few safe letters to recognise them by, and a hash that tells them apart."""
    words = re.sub(r"[^a-z0-9]+", "-", unicodedata.normalize("NFKD", prompts[0].lower()))[:40].strip("-") or "prompt"
    more = f"-and-{len(prompts) - 1}-more" if len(prompts) > 1 else ""
    name = f"{words}{more}-{key(*prompts)[:8]}-seed{seed}{'-latents' if format_ == 'latents' else ''}"
    return run / "samples" / f"{name}{SUFFIXES[format_]}"
