"""`msd import`: other people's teachers, read without running anything of theirs, written in the project's format."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from msdcli import records
from msdcli.diffusion.denoiser import Denoiser
from msdcli.engine.checkpoints.files import DamagedError
from msdcli.engine.checkpoints.model import MODEL, WEIGHTS, is_complete, load_model, save_model
from msdcli.engine.checkpoints.tensors import load_tensors, load_weights
from msdcli.engine.inputs import autoencoder as autoencoders
from msdcli.engine.tracking.events import Report, silent
from msdcli.errors import UserError
from msdcli.nets import strangers
from msdcli.nets.diffusers import text_encoder
from msdcli.nets.diffusers.building import build_diffusers
from msdcli.nets.diffusers.files import autoencoder_folder, is_pipeline
from msdcli.nets.diffusers.sections import read_section, text_part
from msdcli.nets.edm.importing import check_against, complete_arguments, import_edm, open_edm
from msdcli.recipe.networks import EdmNetworkSettings
from msdcli.rundir import RunDir, file_hash, key, lock, read_json

TEXT = "text"  # the folder of a teacher's text encoder
TOLERANCE = 1e-5  # relative, float32, on the CPU


@dataclass(frozen=True)
class ImportedTeacher:
    """A teacher that has been read: the denoiser, what model.json says of it beside the network, how far it is from a
    reference (None without one), where its autoencoder lies (None in pixel space), and the pipeline that its text
    encoder is copied from (None where it reads no text).
    """

    denoiser: Denoiser
    record: dict[str, Any]
    difference: float | None
    autoencoder: Path | None = None
    pipeline: Path | None = None

    @property
    def agrees(self) -> bool:
        return self.difference is None or self.difference <= TOLERANCE

    def summary(self) -> dict[str, Any]:
        """What a script wants to know."""
        net = self.denoiser
        return {
            "network": net.settings.model_dump(mode="json"),
            "shape": list(net.shape),
            "num_classes": net.num_classes,
            "autoencoder": None if self.autoencoder is None else str(self.autoencoder),
            "parameters": sum(p.numel() for p in net.parameters()),
            "max_relative_difference": _finite(self.difference),
            "tolerance": TOLERANCE,
            "agrees": self.agrees,
        } | self.record


@contextlib.contextmanager
def _brought() -> Iterator[None]:
    """Say of a damaged file that msd did not make what cures it: msd cannot make it again."""
    try:
        yield
    except DamagedError as error:
        raise UserError(error.message, hint="it did not arrive whole: download or copy it again") from None


def check_kind(source: Path) -> None:
    """Raise UserError for a folder that is no teacher, saying what it is."""
    if source.is_dir() and not is_pipeline(source) and not (source / MODEL).is_file():
        what, hint = strangers.of_folder(source)
        raise UserError(f"{source} {what}", hint=hint)


@_brought()
def read(source: Path, *, reference: Path | None = None, autoencoder: Path | None = None) -> ImportedTeacher:
    """Read a pickle of EDM or EDM2, or a folder of diffusers, and compare it with `reference`.

    `autoencoder` is a folder as diffusers saves it, for a latent teacher that does not bring its own. UserError for
    whatever the files may not hold.
    """
    denoiser: Denoiser
    record: dict[str, Any] = {}
    check_kind(source)
    if source.is_dir() and not is_pipeline(source):
        raise UserError(f"{source} is in msd's format already", hint=f"teacher.path={source}")
    if is_pipeline(source):
        denoiser, origin = _read_pipeline(source)
        if denoiser.reads_text:
            record["text_sha256"] = text_identity(source, denoiser.settings.config)
    else:
        denoiser, description = import_edm(source)
        denoiser.settings, origin = _section(description), description["source"]
    difference = None if reference is None else check_against(denoiser, reference)
    record["source"] = origin
    if reference is not None and difference is not None:
        record["check"] = {"file": reference.name, "max_relative_difference": _finite(difference)}
    if autoencoder is None:
        autoencoder = find_autoencoder(source)
    else:
        autoencoders.check_files(autoencoder)
    if autoencoder is not None and (channels := autoencoders.read_geometry(autoencoder).channels) != denoiser.shape[0]:
        raise UserError(f"{autoencoder} makes latents of {channels} channels, {source} knows {denoiser.shape[0]}")
    return ImportedTeacher(denoiser, record, difference, autoencoder, source if denoiser.reads_text else None)


def find_autoencoder(source: Path) -> Path | None:
    """Return where a teacher, in the project's format or from elsewhere, keeps its autoencoder; None: it has none."""
    if not is_pipeline(source):
        return autoencoders.find(source)
    folder = autoencoder_folder(source)
    if folder is not None:
        autoencoders.check_files(folder)
    return folder


@_brought()
def inspect(source: Path) -> Denoiser:
    """Return a teacher's denoiser on the meta device: all that can be is checked before its weights are needed.

    UserError for what is no teacher, from elsewhere or in the project's format.
    """
    check_kind(source)
    if not is_foreign(source):
        return load_model(source)[0].to("meta")
    if is_pipeline(source):
        return _read_pipeline(source)[0].to("meta")
    denoiser, description, _ = open_edm(source)
    denoiser.settings = _section(description)
    return denoiser


def write(imported: ImportedTeacher, folder: Path) -> None:
    """Write the teacher as model.safetensors and model.json, its autoencoder and its text encoder beside them."""
    record = imported.record
    if imported.autoencoder is not None:
        record = record | {"autoencoder": autoencoders.copy(imported.autoencoder, folder / autoencoders.FOLDER)}
    if imported.pipeline is not None:
        part = text_part(imported.pipeline, imported.denoiser.settings.config)
        text_encoder.copy(imported.pipeline, part, folder / TEXT)
    save_model(folder, imported.denoiser, record)


def check_free(folder: Path, source: Path) -> None:
    """Raise UserError if `folder` holds anything but an earlier import of a file of this name."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    model = folder / MODEL
    found = read_json(model) if model.is_file() else None
    said: dict[str, Any] = found if isinstance(found, dict) else {}
    held = said.get("source")
    if not isinstance(held, dict) or held.get("file") != source.name:
        raise UserError(
            f"{folder} exists and is no import of {source.name}: nothing was written", hint="another folder"
        )
    weights = folder / WEIGHTS
    if weights.is_file() and file_hash(weights) != said.get("sha256"):
        raise UserError(
            f"{weights} is not what was imported there and would be lost: nothing was written", hint="another folder"
        )


def _section(description: dict[str, Any]) -> EdmNetworkSettings:
    """The network section of a pickle.

    Dropout is how the original was trained, not what it is: a one-step student and its fake network train without, as
    in DMD2's code.
    """
    arguments = complete_arguments(description) | {"dropout": 0.0}
    return EdmNetworkSettings(preconditioning=description["preconditioning"], arguments=arguments)


def _finite(difference: float | None) -> float | None:
    """JSON knows no infinity, which stands for a number that is none."""
    return None if difference is None or math.isinf(difference) else difference


def _read_pipeline(folder: Path) -> tuple[Denoiser, dict[str, Any]]:
    section, weights = read_section(folder)
    denoiser = build_diffusers(section)
    tensors: dict[str, Tensor] = {}
    for file in weights:
        tensors |= load_tensors(file)[0]
    load_weights(denoiser.net, tensors, weights[0])
    return denoiser.requires_grad_(False).eval(), {"file": folder.name, "sha256": _hash_of(weights)}


def _hash_of(files: list[Path]) -> str:
    """Name weights by their bytes: a single file by its hash, several by those of all."""
    hashes = [file_hash(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def is_foreign(path: Path) -> bool:
    """Whether a teacher's `path` is to be imported; else it is a folder in the project's format."""
    return path.is_file() or is_pipeline(path)


def identity(path: Path) -> str:
    """Name a teacher from elsewhere by what it is: the bytes of all files that are read, and what they are read as.

    A pickle says everything about itself; of a pipeline count the network's weights and configuration with the
    schedule and the kind of prediction (its section), the autoencoder and the text encoder.
    """
    if path.is_file():
        return key("imported", file_hash(path))
    section, weights = read_section(path)
    parts = [section.model_dump(mode="json"), _hash_of(weights)]
    autoencoder = find_autoencoder(path)
    text = [text_identity(path, section.config)] if section.reads_text else []
    return key("imported", *parts, *([] if autoencoder is None else [autoencoders.identity(autoencoder)]), *text)


def text_identity(pipeline: Path, config: dict[str, Any]) -> str:
    """Name a pipeline's text encoder by its files."""
    record = text_part(pipeline, config)
    return key("text", record, [(str(f), file_hash(pipeline / f)) for f in text_encoder.files_of(pipeline, record)])


def shape_of(path: Path) -> tuple[int, ...]:
    """Return the shape of what a teacher with a text encoder makes, without reading its weights."""
    check_kind(path)
    if is_pipeline(path):
        section, _ = read_section(path)
        if section.reads_text:
            return section.config["in_channels"], *[section.config["sample_size"]] * 2
    elif (path / MODEL).is_file() and (path / TEXT).is_dir():
        return tuple(records.model(path / MODEL)["shape"])
    raise UserError(
        f"the data are prompts, and the teacher at {path} reads none",
        hint="teacher.path names a diffusers pipeline with a text encoder, or its import",
    )


def located(run: RunDir, path: Path, report: Report = silent) -> Path:
    """Return the folder of a given teacher; one from elsewhere is imported once, next to the runs that share it."""
    if not is_foreign(path):
        return path
    folder = run.shared / f"teacher-{identity(path)}"
    with lock(folder, "the teacher", wait=report):
        if not is_complete(folder):
            report(f"teacher: importing {path}")
            write(read(path), folder)
    return folder
