"""Pairs of noise and image from the teacher's deterministic sampler, made once per teacher, shard by shard."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdcli.data.base import Dataset, fingerprint, fingerprint_of_version_1, in_turn
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.device_batch import DeviceBatch
from msdcli.diffusion.float32 import fast_float32
from msdcli.diffusion.guidance import Guided, drawn
from msdcli.diffusion.sampler import solve
from msdcli.diffusion.stitch import Stitch
from msdcli.engine.checkpoints.tensors import load_tensors, save_tensors
from msdcli.engine.distributed.cores import side_by_side, spare
from msdcli.engine.inputs import stitches
from msdcli.engine.inputs.dataset import version_of
from msdcli.engine.tracking.events import Progress, Report
from msdcli.engine.train.counting import forward_flops
from msdcli.errors import LockedError
from msdcli.noise import image_noise
from msdcli.recipe import Recipe
from msdcli.recipe.solver import SolverSettings
from msdcli.rundir import RunDir, holder_of, key, lock, read_json, sweep_temporaries, write_json
from msdcli.seeds import derive, generator

RECORD = "pairs.json"
# What a look at the teacher may cost, by its many evaluations, before it is left out: some seconds of a CPU.
LOOK_FLOPS = 2e12
FORMAT = 2  # of pairs: another number where the code draws others from the same recipe


def labels_for(data: Dataset, numbers: range) -> Tensor:
    """Return the classes of samples: those of the data's images in turn, so that classes are as frequent."""
    return data.labels(in_turn(data, numbers))


def worth_a_look(teacher: Denoiser, evaluations: int, images: int) -> bool:
    """Whether so many samples of the teacher, for a picture alone, are drawn here in some seconds."""
    if next(teacher.parameters()).device.type != "cpu":
        return True
    return forward_flops(copy.deepcopy(teacher).to("meta")) * evaluations * images <= LOOK_FLOPS


def sample_teacher(
    teacher: Denoiser,
    z: Tensor,
    classes: Tensor,
    solver: SolverSettings,
    *,
    batch: int,
    u: Tensor | None = None,
    memory: DeviceBatch | None = None,
    numbers: Sequence[int] | None = None,
    seed: int = 0,
    stitch: Stitch | None = None,
) -> Tensor:
    """Return the teacher's samples from unit noise `z`, on the CPU, `batch` (or what fits into memory) at once.

    `u`, a number in [0, 1) per sample, says where in a range of guidance scales each one lies; 1/2 if absent. What a
    stochastic solver adds depends on `seed`, the sample's number (its place, if `numbers` is absent) and the step.
    `stitch`: small networks that are asked in the teacher's place.
    """
    device = next(teacher.parameters()).device
    u = torch.full((len(z),), 0.5) if u is None else u
    at = torch.tensor(range(len(z)) if numbers is None else numbers, dtype=torch.int64)
    options = solver.record()

    def some(*chunk: Tensor) -> Tensor:
        z_, c_, u_ = (t.to(device) for t in chunk[:3])
        noise, uniform = solver_noise(seed, chunk[3].tolist(), tuple(z.shape[1:])), lambda purpose: u_
        ask = drawn(teacher, uniform) if stitch is None else stitch.to(device).call(teacher, c_, uniform)
        # A setting of the process, which means nothing to a CPU: threads beside this one leave it alone.
        beside = device.type == "cpu" and threading.current_thread() is not threading.main_thread()
        with nullcontext() if beside else fast_float32():
            return solve(ask, z_, c_, noise=noise, **options).cpu()

    return (memory or DeviceBatch()).map(some, z, classes, u, at, batch=batch)


def solver_noise(seed: int, numbers: Sequence[int], shape: tuple[int, ...]) -> Callable[[int], Tensor]:
    """Return what a stochastic solver adds in step k: image i's depends on the seed, i and k alone."""
    return lambda step: image_noise(derive("solver", step, seed), numbers, shape)


class Pairs:
    """The pairs of one teacher: folder, shards, and the rule that pair i depends on the seed and on i alone."""

    def __init__(self, run: RunDir, recipe: Recipe, data: Dataset, teacher_hash: str) -> None:
        self.settings, self.solver, self.data = recipe.pairs, recipe.teacher.solver, data
        self._load_stitch = partial(stitches.load, run, recipe)
        self._stitch: Stitch | None = None
        self.batch, self.memory = recipe.evaluation.batch, DeviceBatch()
        # A pair depends on the teacher (its weights, network, autoencoder, text, guidance, stitch are in its hash), the
        # solver, the seed and its number, its class (the data's in turn, whose order and classes the fingerprint has)
        # and the code (FORMAT); a shard on its length. How many are solved at once moves their last bits alone.
        parts = (teacher_hash, fingerprint(data), self.solver.record(), recipe.pairs.seed, recipe.pairs.shard)
        self.folder = self._of_version_1(run) or run.shared / f"pairs-{key('pairs', FORMAT, *parts)}"
        self.teacher_hash = teacher_hash

    def _of_version_1(self, run: RunDir) -> Path | None:
        """Return the pairs that msd 0.1.0 made for this run, where they are; they may have cost hours."""
        if version_of(run) != 1 or "teacher" not in (record := read_json(run.record_file)):
            return None
        seen = (self.solver.record(), self.settings.seed, self.settings.shard, getattr(self.data, "mixed", False))
        name = key("pairs", record["teacher"], fingerprint_of_version_1(self.data), *seen)
        folder = run.shared / f"pairs-{name}"
        return folder if folder.is_dir() else None

    def shards(self) -> list[tuple[Path, range]]:
        """The files that are needed and the pairs in each (the last may hold more than are asked for)."""
        size = self.settings.shard
        return [
            (self.folder / f"{i // size:06d}.safetensors", range(i, i + size))
            for i in range(0, self.settings.count, size)
        ]

    def provide(self, teacher: Denoiser, report: Report) -> tuple[Tensor, Tensor, Tensor]:
        """Return (z, y, c) after making the shards that nobody has made; several processes share the work."""
        begun, made = time.monotonic(), 0
        self.memory.say = report
        sweep_temporaries(self.folder)
        while todo := [(path, numbers) for path, numbers in self.shards() if not path.exists()]:
            before = made
            for path, numbers in todo:
                made += self._make_unless_held(path, numbers, teacher)
                done = sum(len(numbers) for path, numbers in self.shards() if path.exists())
                speed = made / (time.monotonic() - begun)
                report(Progress("pairs", min(done, self.settings.count), self.settings.count, "pairs", {}, speed))
            if made == before:
                time.sleep(0.2)  # others are at what is left
        return self.read()

    def prepare(self, teacher: Denoiser, count: int, report: Report) -> None:
        """Make the shards of the first `count` pairs that nobody has made or is at, so that they can be measured."""
        self.memory.say = report
        wanted = [(path, numbers) for path, numbers in self.shards() if numbers.start < count]

        def make(shard: tuple[Path, range]) -> int:
            return self._make_unless_held(*shard, teacher)

        for (_, numbers), made in zip(wanted, side_by_side(make, wanted, self.at_once(teacher)), strict=True):
            if made:
                done = min(numbers.stop, self.settings.count)
                report(Progress("pairs", done, self.settings.count, "pairs"))

    def examples(self, teacher: Denoiser, classes: list[int], per_class: int) -> list[Tensor] | None:
        """Return up to `per_class` of the teacher's samples of each class: pairs that are there, points drawn anew.

        None where neither is to be had quickly.
        """
        if len(self.data.shape) == 1:
            numbers = range(per_class)
            z = self.noise(numbers)
            asked = [torch.full((per_class,), c) for c in classes]
            u = self.uniform(numbers)
            return [self.sample(teacher, z, c, u, numbers) for c in asked]
        if not (made := [path for path, _ in self.shards() if path.exists()]):
            return None
        parts = [load_tensors(path)[0] for path in made]
        y, c = torch.cat([p["y"] for p in parts]), torch.cat([p["c"] for p in parts])
        return [y[c == k][:per_class] for k in classes]

    def draw(self, teacher: Denoiser, classes: list[int], per_class: int) -> list[Tensor]:
        """Return `per_class` new samples of the teacher of each class, where there are no pairs to show."""
        asked, numbers = torch.tensor(classes).repeat_interleave(per_class), range(len(classes) * per_class)
        z, u = self.noise(numbers), self.uniform(numbers)
        return list(self.sample(teacher, z, asked, u, numbers).split(per_class))

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (z, y, c) from complete shards; the noise is derived again."""
        parts = [load_tensors(path)[0] for path, _ in self.shards()]
        count = self.settings.count
        y, c = torch.cat([p["y"] for p in parts])[:count], torch.cat([p["c"] for p in parts])[:count]
        return self.noise(range(count)), y, c

    def sample(
        self,
        teacher: Denoiser,
        z: Tensor,
        classes: Tensor,
        u: Tensor,
        numbers: range,
        *,
        batch: int | None = None,
        memory: DeviceBatch | None = None,
        solver: SolverSettings | None = None,
    ) -> Tensor:
        """Return the teacher's samples as pairs have them, or by another solver, `batch` at once (as many as the recipe
        measures).
        """
        batch, memory = batch or self.batch, memory or self.memory
        options: dict[str, Any] = {"u": u, "numbers": numbers, "seed": self.seed, "stitch": self._stitched(teacher)}
        return sample_teacher(teacher, z, classes, solver or self.solver, batch=batch, memory=memory, **options)

    def _stitched(self, teacher: Denoiser) -> Stitch | None:
        """The small networks of the recipe, read when they are first needed."""
        if self._stitch is None:
            self._stitch = self._load_stitch(teacher)
        return self._stitch

    def at_once(self, teacher: Denoiser) -> int:
        """Return how many calls of `sample` may run side by side: one, unless a CPU has cores to spare and the teacher
        is one plain network, which remembers nothing of a call.
        """
        plain = not isinstance(teacher, Guided) and not teacher.reads_text and self._stitched(teacher) is None
        return spare(next(teacher.parameters()).device) if plain else 1

    def forget_networks(self) -> None:
        """Let go of the small networks; they are read again when they are needed."""
        self._stitch = None

    @property
    def seed(self) -> int:
        """The seed of everything that is drawn for pairs."""
        return derive("pairs", self.settings.seed)

    def noise(self, numbers: range) -> Tensor:
        """Return the unit noise of the pairs `numbers`."""
        return image_noise(self.seed, list(numbers), self.data.shape)

    def uniform(self, numbers: range) -> Tensor:
        """Return a number in [0, 1) for each of the pairs `numbers`: its guidance, where that is a range."""
        return torch.cat([torch.rand(1, generator=generator("guidance", self.seed, number)) for number in numbers])

    def _make_unless_held(self, path: Path, numbers: range, teacher: Denoiser) -> int:
        """Make one shard, unless another process is at it or has made it; return the number of pairs made."""
        if path.exists() or holder_of(self.folder / f".{path.stem}"):
            return 0
        try:
            with lock(self.folder / f".{path.stem}", "a shard of pairs"):
                if path.exists():
                    return 0
                self._make(path, numbers, teacher)
                return len(numbers)
        except LockedError:
            return 0

    def _make(self, path: Path, numbers: range, teacher: Denoiser) -> None:
        classes = labels_for(self.data, numbers)
        y = self.sample(teacher, self.noise(numbers), classes, self.uniform(numbers), numbers)
        save_tensors(path, {"y": y, "c": classes}, hashed=True)
        write_json(
            self.folder / RECORD,
            {"teacher": self.teacher_hash, "solver": self.solver.record(), "seed": self.settings.seed},
        )
