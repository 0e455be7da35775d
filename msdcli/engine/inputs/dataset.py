"""The data of a run: pictures of the user's own are decoded and checked once, and shared by every process and run."""

from __future__ import annotations

import os
import time
from pathlib import Path

from msdcli import records
from msdcli.data import open_data, prompts
from msdcli.data.base import Dataset
from msdcli.data.folder import PIXELS, RECORD, SHOWN, BadPicture, DecodedPictures, PictureFiles, refusal
from msdcli.engine.inputs import hub, importing
from msdcli.engine.tracking.events import Progress, Report
from msdcli.errors import UserError
from msdcli.recipe import Recipe
from msdcli.recipe.data import FolderSettings, PromptsSettings
from msdcli.recipe.networks import DiffusersNetworkSettings
from msdcli.rundir import RunDir, key, lock, write_json, writing

EVERY = 500  # images between two reports


def provide(run: RunDir, recipe: Recipe, report: Report) -> Dataset:
    """Return the data set, after decoding it if nobody has. UserError listing the pictures that cannot be used."""
    settings = recipe.data
    if isinstance(settings, PromptsSettings):
        return _prompts(run, recipe, settings, report)
    if not isinstance(settings, FolderSettings):
        return open_data(settings)
    return DecodedPictures(_decoded(run, settings, PictureFiles(settings), report))


def look(recipe: Recipe, *, planning: bool = False) -> Dataset:
    """Open a recipe's data as they lie, decoding what is asked for. With `planning`, data that are not here yet are
    what the recipe says of them. Prompts alone have the shape of what the teacher makes.
    """
    made = made_by_teacher(recipe, planning=planning) if recipe.has_prompts else None
    return open_data(recipe.data, planning=planning, made=made)


def made_by_teacher(recipe: Recipe, *, planning: bool = False) -> tuple[int, ...]:
    """Return the shape of what a text-conditioned teacher makes. UserError if it reads no text."""
    settings = recipe.teacher
    if settings.path is None:
        raise UserError(
            "the data are prompts: their teacher must be a given one, with its text encoder",
            hint="teacher.path names a diffusers pipeline",
        )
    for path in (hub.cached(settings.path), RunDir(recipe.run_dir).teacher):
        if path is not None and path.exists():
            return importing.shape_of(path)
    if hub.is_hub(settings.path) and not planning:
        return importing.shape_of(hub.resolve(settings.path))
    network = settings.network
    if not planning:
        raise UserError(
            f"no model at {settings.path}", hint=f"get it from {settings.source}" if settings.source else None
        )
    if not isinstance(network, DiffusersNetworkSettings) or not network.reads_text:
        raise UserError("the data are prompts: teacher.network must describe a text-conditioned network of diffusers")
    return network.config.get("in_channels", 4), *[network.config.get("sample_size", 64)] * 2


def _prompts(run: RunDir, recipe: Recipe, settings: PromptsSettings, report: Report) -> Dataset:
    captions = prompts.read(settings)
    report(f"data: {captions.told()}")
    if settings.pictures is None:
        return prompts.Prompts(captions, made_by_teacher(recipe))
    pictures = PictureFiles(settings.pictures)
    folder = _decoded(run, settings.pictures, pictures, report)
    skipped = set(records.read(folder / RECORD, records.Decoded, "record of pictures")["skipped"])
    names = [name for name in pictures.names if name not in skipped]
    skip = settings.on_bad == "skip"
    return prompts.with_pictures(captions, DecodedPictures(folder), names, skip=skip, where=str(settings.images))


def _decoded(run: RunDir, settings: FolderSettings, pictures: PictureFiles, report: Report) -> Path:
    """Return the folder with the decoded pictures."""
    section = settings.model_dump(mode="json", exclude={"source", "count", "classes"})
    folder = run.shared / f"data-{key('data', section, pictures.fingerprint())}"
    with lock(folder, "the data", wait=report):
        if not (folder / RECORD).exists():
            _decode(pictures, folder, report)
    return folder


def _decode(pictures: PictureFiles, folder: Path, report: Report) -> None:
    workers = min(32, os.cpu_count() or 1)
    begun, bad, kept = time.monotonic(), list[BadPicture](), list[int]()
    with writing(folder / PIXELS) as temporary, open(temporary, "wb") as file:
        for number, picture in enumerate(pictures.decode_all(workers)):
            if isinstance(picture, BadPicture):
                bad.append(picture)
            else:
                file.write(picture.tobytes())
                kept.append(number)
            if number % EVERY == EVERY - 1 or number == len(pictures) - 1:
                speed = (number + 1) / (time.monotonic() - begun)
                report(Progress("data", number + 1, len(pictures), "images", {}, speed))
        if bad and (pictures.settings.on_bad == "refuse" or not kept):
            raise refusal(pictures.settings, bad)
    seconds = time.monotonic() - begun
    write_json(
        folder / RECORD,
        {
            "shape": list(pictures.shape),
            "class_names": pictures.class_names,
            "labels": pictures.labels(kept).tolist(),
            "skipped": {b.name: b.reason for b in bad},
            "seconds": seconds,
        },
    )
    report(f"data: {len(kept):,} images decoded at {len(kept) / seconds:,.0f} images/s ({workers} threads)")
    if bad:
        names = ", ".join(b.name for b in bad[:SHOWN]) + (", ..." if len(bad) > SHOWN else "")
        report(f"data: {len(bad):,} pictures were skipped: {names} (all are listed in {folder / RECORD})")
