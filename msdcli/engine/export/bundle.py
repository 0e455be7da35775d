"""Students as safetensors and JSON, for msd itself: the smallest export, and bit-exact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msdcli import records
from msdcli.engine import sample
from msdcli.engine.checkpoints.model import MODEL, WEIGHTS
from msdcli.engine.export.format import ExportResult, RunStudents, described
from msdcli.engine.inputs import autoencoder
from msdcli.engine.inputs.importing import TEXT
from msdcli.rundir import file_hash, link, read_json, write_json, writing

if TYPE_CHECKING:
    from msdcli.engine.export.format import ExportResult, ExportSource


def write(source: ExportSource) -> ExportResult:
    """Copy every student's weights and card."""
    for k, trained in enumerate(source.students.folders):
        _copy(trained, source.folder / "students" / str(k))
    if adapters := any("adapter" in records.model(folder / MODEL) for folder in source.students.folders):
        _copy(source.run.teacher, source.folder / sample.BASE)
    if source.students.autoencoder is not None:
        autoencoder.copy(source.students.autoencoder, source.folder / autoencoder.FOLDER)
    # What `load` needs; the whole record follows.
    prompt_router = source.students.prompt_router
    if prompt_router is not None:
        link(prompt_router.text, source.folder / TEXT)
    names = source.students.class_names if prompt_router is None else []
    text = {} if prompt_router is None else {"embeddings": prompt_router.dtype}
    write_json(source.folder / sample.BUNDLE, {"class_names": names} | text)

    def reopened(most: int | None, memory: int | None) -> RunStudents:
        students = sample.load(source.folder)
        sizes = [(folder / WEIGHTS).stat().st_size for folder in students.folders]
        if adapters and memory is not None:  # the base stays
            memory -= (source.folder / sample.BASE / WEIGHTS).stat().st_size
        fit = [len(sizes) if memory is None else max(1, memory // max(sizes)), *([] if most is None else [most])]
        students.max_resident = min(fit)
        return RunStudents(students)

    last, shape = len(source.students.class_names) - 1, ", ".join(map(str, source.shape))
    asked = (
        f"classes=[0, {last}]" if prompt_router is None else f"prompts={json.dumps(source.students.class_names[:2])}"
    )
    usage = (
        f'import msdcli\n\nstudents = msdcli.load("{{folder}}")\n'
        f"images = students.sample({asked}, seed=0)  # float32 [2, {shape}]\n"
        f"print(images.shape{', students.class_names' if prompt_router is None else ''})\n"
    )
    files = [source.folder / "students" / str(k) / WEIGHTS for k in range(len(source.students.folders))]
    record: dict[str, Any] = {"students": described(source, files)} | text
    if adapters:
        record["base"] = described(source, [source.folder / sample.BASE / WEIGHTS])[0]
    return ExportResult(open=reopened, usage=usage, record=record, tolerance=0.0)


def _copy(source: Path, target: Path) -> None:
    for name in (WEIGHTS, MODEL):
        with writing(target / name) as temporary:
            shutil.copyfile(source / name, temporary)
    described = read_json(target / MODEL)["sha256"]
    assert described == file_hash(target / WEIGHTS), "the copy differs from what was trained"
