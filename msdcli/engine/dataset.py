"""The data of a run: pictures of the user's own are decoded and checked once, and shared by every process and run."""

from __future__ import annotations

import os
import time
from pathlib import Path

from msdcli.data import open_data
from msdcli.data.base import Dataset
from msdcli.data.folder import PIXELS, RECORD, SHOWN, Bad, Decoded, Pictures, refusal
from msdcli.engine.events import Progress, Report
from msdcli.recipe import FolderSettings, Recipe
from msdcli.rundir import RunDir, key, lock, write_json, writing

EVERY = 500  # images between two reports


def provide(run: RunDir, recipe: Recipe, report: Report) -> Dataset:
    """Return the data set, after decoding it if nobody has. UserError listing the pictures that cannot be used."""
    settings = recipe.data
    if not isinstance(settings, FolderSettings):
        return open_data(settings)
    pictures = Pictures(settings)
    section = settings.model_dump(mode="json", exclude={"source", "count", "classes"})
    folder = run.shared / f"data-{key('data', section, pictures.fingerprint())}"
    with lock(folder, "the data", wait=report):
        if not (folder / RECORD).exists():
            _decode(pictures, folder, report)
    return Decoded(folder)


def _decode(pictures: Pictures, folder: Path, report: Report) -> None:
    workers = min(32, os.cpu_count() or 1)
    begun, bad, kept = time.monotonic(), list[Bad](), list[int]()
    with writing(folder / PIXELS) as temporary, open(temporary, "wb") as file:
        for number, picture in enumerate(pictures.decode_all(workers)):
            if isinstance(picture, Bad):
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
