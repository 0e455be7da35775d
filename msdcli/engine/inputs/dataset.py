"""The data of a run: pictures of the user's own are decoded and checked once, and shared by every process and run."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import PIL

from msdcli import records
from msdcli.data import open_data, prompts
from msdcli.data.base import FINGERPRINT, Dataset, fingerprint, fingerprint_of_version_1, split
from msdcli.data.conditions import Conditions
from msdcli.data.files.labels import empty_classes
from msdcli.data.folder import (
    PIXELS,
    RECORD,
    SHOWN,
    BadPicture,
    DecodedPictures,
    ExpectedPictures,
    PictureFiles,
    refusal,
)
from msdcli.engine.checkpoints.model import MODEL
from msdcli.engine.inputs import hub, importing
from msdcli.engine.tracking.events import Progress, Report
from msdcli.errors import MissingFileError, UserError
from msdcli.recipe import Recipe
from msdcli.recipe.data import FolderSettings, NoDataSettings, PromptsSettings
from msdcli.recipe.networks import DiffusersNetworkSettings
from msdcli.rundir import RunDir, key, lock, write_json, writing

EVERY = 500  # images between two reports
FORMAT = 2  # of decoded pictures: another number where the code below decodes otherwise


def provide(run: RunDir, recipe: Recipe, report: Report) -> Dataset:
    """Return the data to train on, after decoding them if nobody has. UserError listing the pictures that cannot be
    used.
    """
    return provide_parts(run, recipe, report)[0]


def provide_parts(run: RunDir, recipe: Recipe, report: Report) -> tuple[Dataset, Dataset]:
    """Return the data to train on and those that distances are measured against: all of them in both places, unless the
    recipe holds some out.
    """
    return split(_whole(run, recipe, report), held_out_of(recipe))


def held_out_of(recipe: Recipe) -> float | None:
    """The part of every class's pictures that the recipe keeps out of training."""
    return recipe.data.held_out if isinstance(recipe.data, FolderSettings) else None


def _whole(run: RunDir, recipe: Recipe, report: Report) -> Dataset:
    settings = recipe.data
    if isinstance(settings, PromptsSettings):
        return _prompts(run, recipe, settings, report)
    if isinstance(settings, NoDataSettings):
        return conditions_of_teacher(run, recipe)
    if not isinstance(settings, FolderSettings):
        return open_data(settings)
    data = DecodedPictures(_decoded(run, settings, PictureFiles(settings), report))
    empty = empty_classes(data.labels(range(len(data))).numpy(), len(data.class_names))
    if empty:
        names = ", ".join(data.class_names[c] for c in empty[:SHOWN]) + (", ..." if len(empty) > SHOWN else "")
        report(f"data: {len(empty):,} of {len(data.class_names):,} classes have no picture: {names}")
    return data


def look(recipe: Recipe, *, planning: bool = False) -> Dataset:
    """Open the data that a recipe trains on as they lie, decoding what is asked for. With `planning`, data that are not
    here yet are what the recipe says of them, whole. Prompts alone have the shape of what the teacher makes.
    """
    if isinstance(recipe.data, NoDataSettings):
        return conditions_of_teacher(RunDir(recipe.run_dir), recipe, planning=planning)
    made = made_by_teacher(recipe, planning=planning) if recipe.has_prompts else None
    data = open_data(recipe.data, planning=planning, made=made)
    return data if isinstance(data, ExpectedPictures) else split(data, held_out_of(recipe))[0]


def conditions_of_teacher(run: RunDir, recipe: Recipe, *, planning: bool = False) -> Conditions:
    """Return the classes of a given teacher, which stand for the data where there are none."""
    said = recipe.teacher.path
    assert said is not None, "recipes without data are checked for it"
    begun = run.recipe_file.is_file() and (run.teacher / MODEL).is_file() and run.recipe().teacher.path == said
    path = run.teacher if begun else (hub.cached if planning else hub.resolve)(said)
    if path is None or not path.exists():
        source = recipe.teacher.source
        hint = hub.by_hand(said) if path is None else f"get it from {source}" if source else None
        raise MissingFileError(f"no model at {said}, and without data it says what there is to be made", hint=hint)
    importing.check_kind(path)
    if importing.is_foreign(path):
        made = importing.inspect(path)
        shape, num_classes, reads_text = made.shape, made.num_classes, made.reads_text
    else:
        record = records.model(path / MODEL)
        shape, num_classes, reads_text = tuple(record["shape"]), record["num_classes"], (path / importing.TEXT).is_dir()
    if reads_text:
        raise UserError(
            f"the teacher at {path} is conditioned on prompts, and the recipe has none",
            hint="data: {name: prompts, path: ...}",
        )
    return Conditions(shape, num_classes)


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
        raise MissingFileError(
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
    # Pixels depend on the files, on size, channels, crop, resize and pad, and on the code; numbers and classes on the
    # files, on on_bad and labels. (`source`, `count` and `classes` decide nothing: they are said, or checked; `mirror`
    # and `held_out` are for training. Without `pad` the name is that of the time before there was one.) What is left is
    # Pillow: another version may decode a JPEG to other last bits. That is no reason to refuse a run its data, and the
    # hash of the pixels themselves names all that is made from them.
    section = settings.model_dump(mode="json", exclude={"source", "count", "classes", "mirror", "held_out"})
    if settings.pad == "none":
        del section["pad"]
    files = pictures.fingerprint()
    folder = run.shared / f"data-{key('data', FORMAT, section, files)}"
    with lock(folder, "the data", wait=report):
        if not (folder / RECORD).exists():
            _decode(pictures, folder, files, report)
    return folder


def _decode(pictures: PictureFiles, folder: Path, files: str, report: Report) -> None:
    workers = min(32, os.cpu_count() or 1)
    begun, bad, kept = time.monotonic(), list[BadPicture](), list[int]()
    digest = hashlib.sha256()
    with writing(folder / PIXELS) as temporary, open(temporary, "wb") as file:
        for number, picture in enumerate(pictures.decode_all(workers)):
            if isinstance(picture, BadPicture):
                bad.append(picture)
            else:
                file.write(pixels := picture.tobytes())
                digest.update(pixels)
                kept.append(number)
            if number % EVERY == EVERY - 1 or number == len(pictures) - 1:
                speed = (number + 1) / (time.monotonic() - begun)
                report(Progress("data", number + 1, len(pictures), "images", {}, speed))
        if bad and (pictures.settings.on_bad == "refuse" or not kept):
            raise refusal(pictures.settings, bad, of=len(pictures))
        if pictures.changed(files):
            raise UserError(
                f"{pictures.settings.path} changed while its pictures were decoded",
                hint="the same command again, once nobody writes there",
            )
    seconds = time.monotonic() - begun
    write_json(
        folder / RECORD,
        {
            "shape": list(pictures.shape),
            "class_names": pictures.class_names,
            "labels": pictures.labels(kept).tolist(),
            "skipped": {b.name: b.reason for b in bad},
            "sha256": digest.hexdigest(),  # of the pixels
            "pillow": PIL.__version__,
            "seconds": seconds,
        },
    )
    report(f"data: {len(kept):,} images decoded at {len(kept) / seconds:,.0f} images/s ({workers} threads)")
    if bad:
        names = ", ".join(b.name for b in bad[:SHOWN]) + (", ..." if len(bad) > SHOWN else "")
        report(f"data: {len(bad):,} pictures were skipped: {names} (all are listed in {folder / RECORD})")


# What a run was made from.


def version_of(run: RunDir) -> int:
    """Return by which version of fingerprints run.json names data and teacher: 1 where msd 0.1.0 wrote it. UserError
    for one that this msd does not know.
    """
    record: dict[str, Any] = records.run(run.record_file) if run.record_file.exists() else {}
    found = record.get("fingerprints", 1 if record.keys() & {"data", "teacher"} else FINGERPRINT)
    if found not in (1, FINGERPRINT):
        raise UserError(
            f"{run.record_file} names its data and teacher by fingerprints of version {found!r}; this msd knows 1 and "
            f"{FINGERPRINT}",
            hint="the msd that began the run, or a newer one, goes on with it",
        )
    return int(found)


def fingerprint_for(run: RunDir, data: Dataset) -> str:
    """Return the data's fingerprint of the version that the run's record has."""
    return fingerprint(data) if version_of(run) == FINGERPRINT else fingerprint_of_version_1(data)


def is_as_begun(run: RunDir, data: Dataset) -> bool:
    """Whether a run's data are those that it was begun with, or nothing is written of any."""
    record: dict[str, Any] = records.run(run.record_file) if run.record_file.exists() else {}
    return "data" not in record or record["data"] == fingerprint_for(run, data)
