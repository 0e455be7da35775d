"""Students as safetensors and JSON, for msd itself: the smallest export, and bit-exact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from msdcli.engine import autoencoder, checkpoint, export, sample
from msdcli.engine.importing import TEXT
from msdcli.rundir import file_hash, link, read_json, write_json, writing

if TYPE_CHECKING:
    from msdcli.engine.export import Given, Written


def write(given: Given) -> Written:
    """Copy every student's weights and card."""
    for k, source in enumerate(given.students.folders):
        _copy(source, given.folder / "students" / str(k))
    if given.students.autoencoder is not None:
        autoencoder.copy(given.students.autoencoder, given.folder / autoencoder.FOLDER)
    # What `load` needs; the whole record follows.
    desk = given.students.desk
    if desk is not None:
        link(desk.text, given.folder / TEXT)
    names = given.students.class_names if desk is None else []
    text = {} if desk is None else {"embeddings": desk.dtype}
    write_json(given.folder / sample.BUNDLE, {"class_names": names} | text)

    def reopened(most: int | None, memory: int | None) -> export.OfRun:
        students = sample.load(given.folder)
        sizes = [(folder / checkpoint.WEIGHTS).stat().st_size for folder in students.folders]
        fit = [len(sizes) if memory is None else max(1, memory // max(sizes)), *([] if most is None else [most])]
        students.max_resident = min(fit)
        return export.OfRun(students)

    last, shape = len(given.students.class_names) - 1, ", ".join(map(str, given.shape))
    asked = f"classes=[0, {last}]" if desk is None else f"prompts={json.dumps(given.students.class_names[:2])}"
    usage = (
        f'import msdcli\n\nstudents = msdcli.load("{{folder}}")\n'
        f"images = students.sample({asked}, seed=0)  # float32 [2, {shape}]\n"
        "print(images.shape, students.class_names)\n"
    )
    files = [given.folder / "students" / str(k) / checkpoint.WEIGHTS for k in range(len(given.students.folders))]
    record = {"students": export.described(given, files)} | text
    return export.Written(open=reopened, usage=usage, record=record, tolerance=0.0)


def _copy(source: Path, target: Path) -> None:
    for name in (checkpoint.WEIGHTS, checkpoint.MODEL):
        with writing(target / name) as temporary:
            shutil.copyfile(source / name, temporary)
    described = read_json(target / checkpoint.MODEL)["sha256"]
    assert described == file_hash(target / checkpoint.WEIGHTS), "the copy differs from what was trained"
