"""Give the students away: weights, partition and a README, checked against the run before it says done."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from msdcli.engine import autoencoder, checkpoint, sample
from msdcli.errors import UserError
from msdcli.rundir import RunDir, file_hash, read_json, write_json, write_text, writing

README = """# {name}: {count} one-step students

Distilled with msd from one diffusion teacher. Every class belongs to one student; a sample costs one network
evaluation.

```python
import msdcli

students = msdcli.load("{folder}")
images = students.sample(classes=[{example}], seed=0)  # float32 [2, {shape}]{span}
print(images.shape, students.class_names)
```

| student | classes | parameters | sha256 of model.safetensors |
|---|---|---|---|
{table}
"""


def bundle(run: RunDir, folder: Path) -> dict[str, Any]:
    """Write the students of a finished run to `folder` and load them back.

    Returns the record with `max_difference`, the largest difference between the run's samples and the bundle's: it must
    be 0. UserError if the run is not finished or `folder` holds something else; RuntimeError if the samples differ.
    """
    students = sample.load(run.root)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / sample.BUNDLE).is_file():
        raise UserError(f"{folder} exists and is no bundle: nothing was written", hint="--out another folder")
    known = read_json(run.record_file)
    cards = [_copy(source, folder / "students" / str(k)) for k, source in enumerate(students.folders)]
    students.partition.save(folder / "partition.json")
    if students.autoencoder is not None:
        autoencoder.copy(students.autoencoder, folder / autoencoder.FOLDER)
    write_text(folder / "README.md", _readme(run, students, known, cards, folder))
    record = {
        "format": checkpoint.FORMAT,
        "name": run.root.name,
        "class_names": students.class_names,
        "shape": known["shape"],
    }
    write_json(folder / sample.BUNDLE, record | {"students_sha256": [card["sha256"] for card in cards]})
    return record | {"folder": str(folder), "students": len(cards), "max_difference": verify(students, folder)}


def _copy(source: Path, target: Path) -> dict[str, Any]:
    for name in (checkpoint.WEIGHTS, checkpoint.MODEL):
        with writing(target / name) as temporary:
            shutil.copyfile(source / name, temporary)
    card: dict[str, Any] = read_json(target / checkpoint.MODEL)
    assert card["sha256"] == file_hash(target / checkpoint.WEIGHTS), "the copy differs from what was trained"
    return card


def verify(students: sample.Students, folder: Path, *, per_class: int = 4) -> float:
    """Return the largest difference between samples of a run and of its bundle; RuntimeError unless it is 0."""
    classes = [c for c in range(len(students.class_names)) for _ in range(per_class)]
    difference = (students.sample(classes) - sample.load(folder).sample(classes)).abs().max().item()
    if difference != 0:
        raise RuntimeError(f"{folder}: the exported students differ from the run's by {difference:g}")
    return difference


def _readme(
    run: RunDir, students: sample.Students, known: dict[str, Any], cards: list[dict[str, Any]], folder: Path
) -> str:
    names = students.class_names
    table = "\n".join(
        f"| {k} | {', '.join(names[c] for c in part)} | {card['parameters']:,} | `{card['sha256'][:16]}` |"
        for k, (part, card) in enumerate(zip(students.partition.parts, cards, strict=True))
    )
    pictures = len(known["shape"]) == 3
    return README.format(
        name=run.root.name,
        count=len(cards),
        folder=folder,
        example=f"0, {len(names) - 1}",
        shape=", ".join(map(str, known["shape"])),
        span=" in [-1, 1]" if pictures else "",
        table=table,
    )
