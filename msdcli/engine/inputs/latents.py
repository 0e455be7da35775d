"""`msd latents`: a data set encoded once with the teacher's autoencoder, for every run and process that shares it."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msdcli.data.base import Dataset, fingerprint, fingerprint_of_version_1
from msdcli.data.latents import DTYPES, LATENTS, RECORD, Latents
from msdcli.diffusion.device_batch import DeviceBatch
from msdcli.diffusion.float32 import fast_float32
from msdcli.engine.distributed import device
from msdcli.engine.inputs import dataset, hub, importing
from msdcli.engine.inputs import teacher as teachers
from msdcli.engine.inputs.autoencoder import find, identity, open_autoencoder, shape_seen, view
from msdcli.engine.tracking.events import Progress, Report
from msdcli.errors import LockedError, MissingFileError, UserError
from msdcli.nets.diffusers.autoencoder import Autoencoder
from msdcli.recipe import LatentSettings, Recipe
from msdcli.rundir import RunDir, holder_of, key, lock, write_json, writing

SHARD = 1024  # images that an interruption can cost
FORMAT = 2  # of latents: another number where the code encodes otherwise


def provide(
    run: RunDir, recipe: Recipe, data: Dataset, teacher: Path, on: torch.device, report: Report, *, always: bool
) -> Dataset:
    """Return the data as the teacher in folder `teacher` sees them, after encoding what nobody has encoded.

    Without `always`, only where a stage of the recipe looks at images. Several processes share the work.
    """
    autoencoder = find(teacher)
    if (
        autoencoder is None
        or view(data, autoencoder) is data
        or not (always or any(stage.needs_images for stage in recipe.stages))
    ):
        return view(data, autoencoder)
    settings = recipe.latents
    job = LatentEncoder(data, autoencoder, settings, run.shared)
    if dataset.version_of(run) == 1:
        job.take_up_version_1()
    job.run(on, report)
    return Latents(data, job.shape, job.folder, posterior=settings.posterior, seed=settings.seed)


class LatentEncoder:
    """One data set under one autoencoder: a file of moments, filled shard by shard.

    A shard is written in place and synced before its mark appears; what has no mark is made again. The record comes
    last and makes the folder complete.
    """

    def __init__(self, data: Dataset, autoencoder: Path, settings: LatentSettings, shared: Path) -> None:
        self.data, self.autoencoder, self.settings, self.memory = data, autoencoder, settings, DeviceBatch()
        self.shape = shape_seen(data, autoencoder)
        self.dtype = np.dtype(DTYPES[settings.dtype])
        # Moments depend on the pictures, the autoencoder (its weights and configuration, the scaling of latents among
        # it), the type that they are kept in and the code (FORMAT); `batch` and the device move their last bits alone.
        # What is drawn from them by `posterior` and `seed` is not kept.
        parts = (fingerprint(data), identity(autoencoder), settings.dtype)
        self.folder = shared / f"latents-{key('latents', FORMAT, *parts)}"

    def take_up_version_1(self) -> None:
        """Go on with the latents that msd 0.1.0 encoded for the run, where they are whole: they may have cost hours."""
        parts = (fingerprint_of_version_1(self.data), identity(self.autoencoder), self.settings.dtype)
        folder = self.folder.with_name(f"latents-{key('latents', *parts)}")
        if (folder / RECORD).is_file():
            self.folder = folder

    @property
    def one(self) -> int:
        """Bytes of an image's two moments."""
        return 2 * int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return len(self.data) * self.one

    def done(self) -> bool:
        return (self.folder / RECORD).is_file()

    def shards(self) -> list[tuple[Path, range]]:
        """The marks, and the images that each stands for."""
        count = len(self.data)
        return [(self.folder / f"{i:09d}.done", range(i, min(i + SHARD, count))) for i in range(0, count, SHARD)]

    def run(self, on: torch.device, report: Report) -> None:
        """Encode what is not encoded yet; other processes may be at it too."""
        if self.done():
            return
        self._allocate()
        network, begun, made = open_autoencoder(self.autoencoder, on), time.monotonic(), 0
        while not self.done():
            before = made
            for mark, numbers in self.shards():
                made += self._make_unless_held(mark, numbers, network, report, made, begun)
            if all(mark.exists() for mark, _ in self.shards()) or self.done():
                self._finish(time.monotonic() - begun, made, report)
            elif made == before:
                time.sleep(0.2)  # others are at what is left

    def _allocate(self) -> None:
        """Make the file in its whole length, once; UserError where the disk has no room."""
        with lock(self.folder, "the latents", wait=lambda _: None):
            path = self.folder / LATENTS
            if self.done() or path.is_file():
                return
            free = shutil.disk_usage(self.folder).free
            if free < self.num_bytes:
                raise UserError(
                    f"the latents need {self.num_bytes:,} bytes in {self.folder.parent}, which has {free:,} left",
                    hint="latents.dtype=float16 needs half of float32; run=... on another disk",
                )
            with writing(path) as temporary, open(temporary, "wb") as file:
                file.truncate(self.num_bytes)

    def _make_unless_held(
        self, mark: Path, numbers: range, network: Autoencoder, report: Report, made: int, begun: float
    ) -> int:
        """Encode one shard, unless another process is at it or has made it; return the number of its images."""
        place = self.folder / f".{mark.stem}"
        if self.done() or mark.exists() or holder_of(place):
            return 0
        try:
            with lock(place, "a shard of latents"):
                if self.done() or mark.exists():
                    return 0
                self._make(numbers, network, report, made, begun)
                write_json(mark, len(numbers))
                return len(numbers)
        except LockedError:
            return 0

    def _make(self, numbers: range, network: Autoencoder, report: Report, made: int, begun: float) -> None:
        on, step = network.shift.device, self.settings.batch
        self.memory.say = report

        def encoded(images: Tensor) -> Tensor:
            with fast_float32():
                return torch.stack(network.encode(images.to(on)), dim=1).cpu()

        with open(self.folder / LATENTS, "r+b") as file:
            file.seek(numbers.start * self.one)
            for start in range(numbers.start, numbers.stop, step):
                part = range(start, min(start + step, numbers.stop))
                moments = self.memory.map(encoded, self.data.images(part)).numpy()
                self._check(moments, part)
                file.write(moments.astype(self.dtype).tobytes())
                speed = (made + part.stop - numbers.start) / max(time.monotonic() - begun, 1e-9)
                report(Progress("latents", part.stop, len(self.data), "images", {}, speed))
            file.flush()
            os.fsync(file.fileno())

    def _check(self, moments: np.ndarray, part: range) -> None:
        """Refuse what the file's type cannot hold."""
        largest = float(np.abs(moments).max())  # NaN, if there is one
        if not largest <= float(np.finfo(str(self.dtype)).max):
            raise UserError(
                f"the autoencoder gives latents as large as {largest:g} for images {part.start} to {part.stop - 1}, "
                f"which {self.dtype} cannot hold",
                hint="latents.dtype=float32" if np.isfinite(largest) else "is it the right autoencoder?",
            )

    def _finish(self, seconds: float, made: int, report: Report) -> None:
        with lock(self.folder, "the latents", wait=lambda _: None):
            if not self.done():
                record = {
                    "shape": [len(self.data), 2, *self.shape],
                    "dtype": self.settings.dtype,
                    "moments": ["mean", "std"],
                    "data": fingerprint(self.data),
                    "autoencoder": identity(self.autoencoder),
                }
                write_json(self.folder / RECORD, record)
        for mark, _ in self.shards():
            mark.unlink(missing_ok=True)
            shutil.rmtree(self.folder / f".{mark.stem}", ignore_errors=True)
        if made:
            report(f"latents: {made:,} images encoded at {made / seconds:,.1f} images/s to {self.folder}")


# The verb.


def encode(recipe: Recipe, report: Report) -> dict[str, Any]:
    """Encode a recipe's data, after importing its teacher and decoding its pictures where nobody has.

    Return what the latents are like. Nothing is written into the run itself.
    """
    run, on = RunDir(recipe.run_dir), device.prepare(recipe)
    source = _latent_teacher(recipe)
    teachers.on_meta(recipe, dataset.look(recipe))  # does it fit?
    data = dataset.provide(run, recipe, report)
    folder = source if find(source) else importing.located(run, source, report)
    found = provide(run, recipe, data, folder, on, report, always=True)
    autoencoder = find(folder)
    assert isinstance(found, Latents) and autoencoder is not None
    job = LatentEncoder(data, autoencoder, recipe.latents, run.shared)
    return summary(found, open_autoencoder(autoencoder, on)) | {"folder": str(job.folder)}


def plan(recipe: Recipe) -> list[str]:
    """Return what `encode` would do, after checking it; nothing is written."""
    data, source = dataset.look(recipe), _latent_teacher(recipe)
    teachers.on_meta(recipe, data)
    shape = shape_seen(data, importing.find_autoencoder(source))
    size = len(data) * 2 * int(np.prod(shape)) * np.dtype(DTYPES[recipe.latents.dtype]).itemsize
    return [
        f"data:    {recipe.data.name}, {len(data):,} images of {list(data.shape)}",
        f"latents: {list(shape)}, mean and std as {recipe.latents.dtype}: {size:,} bytes in "
        f"{RunDir(recipe.run_dir).shared}",
        f"device:  {device.resolve(recipe.device)}, {recipe.latents.batch} images at once",
    ]


def _latent_teacher(recipe: Recipe) -> Path:
    """Return where the recipe's teacher lies. UserError unless it is a latent model."""
    if recipe.teacher.path is None:
        raise UserError("the recipe's teacher is trained here, in pixel space", hint="teacher.path=a latent model")
    path = hub.resolve(recipe.teacher.path)
    if not path.exists():
        raise MissingFileError(
            f"no model at {path}", hint=recipe.teacher.source and f"get it from {recipe.teacher.source}"
        )
    if importing.find_autoencoder(path) is None:
        raise UserError(
            f"the teacher at {path} works on pictures: it has no autoencoder, and there is nothing to encode"
        )
    return path


@torch.no_grad()
def summary(data: Latents, network: Autoencoder, *, probes: int = 16) -> dict[str, Any]:
    """Say what the latents are like, channel by channel, and how well pictures survive the way there and back."""
    numbers = sorted({i * (len(data) - 1) // (probes - 1) for i in range(probes)})
    z, pictures = data.images(numbers), data.pictures.images(numbers)
    found = network.decode(z.to(network.shift.device)).cpu().clamp(-1, 1)
    error = (found - pictures).square().mean().item()
    return {
        "images": len(data),
        "shape": list(data.shape),
        "posterior": data.posterior,
        "mean": [round(v, 4) for v in z.mean((0, 2, 3)).tolist()],
        "std": [round(v, 4) for v in z.std((0, 2, 3)).tolist()],
        "psnr": round(10 * float(np.log10(4 / max(error, 1e-12))), 2),  # pictures span 2, from -1 to 1
    }
