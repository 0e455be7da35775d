"""The autoencoder of a latent teacher, a part of its folder: found, read, copied, and what it makes of data."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from msdcli.data.base import Dataset
from msdcli.data.latents import Latents
from msdcli.diffusion.float32 import fast_float32
from msdcli.engine.checkpoints.tensors import load_tensors, load_weights
from msdcli.errors import UserError
from msdcli.nets.diffusers.autoencoder import Autoencoder, Geometry, build_autoencoder, geometry
from msdcli.rundir import file_hash, key, read_json, writing

FOLDER = "autoencoder"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"

Decode = Callable[[Tensor], Tensor]


def find(teacher: Path) -> Path | None:
    """Return where a teacher in the project's format, or an exported bundle, keeps its autoencoder; None: it has none.

    UserError if a file of it is missing.
    """
    folder = teacher / FOLDER
    if not folder.is_dir():
        return None
    check_files(folder)
    return folder


def check_files(folder: Path) -> None:
    """Raise UserError unless an autoencoder as the diffusers library saves it is here."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name} is missing: the teacher is a latent model and needs its autoencoder",
                hint="only safetensors are read; diffusers' save_pretrained writes them",
            )


def read_geometry(folder: Path) -> Geometry:
    """Return what an autoencoder makes of pictures, from its configuration alone."""
    return geometry(read_json(folder / CONFIG))


def open_autoencoder(folder: Path, device: torch.device | str = "cpu") -> Autoencoder:
    """Read an autoencoder: every weight must be there, and fit."""
    autoencoder = build_autoencoder(read_json(folder / CONFIG))
    tensors, _ = load_tensors(folder / WEIGHTS)
    load_weights(autoencoder.net, tensors, folder / WEIGHTS)
    return autoencoder.to(device)


def copy(source: Path, target: Path) -> str:
    """Copy an autoencoder's two files into the folder `target`; return the hash of its weights and configuration."""
    open_autoencoder(source)  # it is whole, or nothing is written
    for name in (CONFIG, WEIGHTS):
        with writing(target / name) as temporary:
            shutil.copyfile(source / name, temporary)
    return identity(target)


def identity(folder: Path) -> str:
    """Name an autoencoder by what it is: its weights and its configuration, which has the scaling of latents."""
    return key(read_json(folder / CONFIG), file_hash(folder / WEIGHTS))


def decoder(teacher: Path, device: torch.device) -> Decode:
    """Return what makes pictures of a teacher's or a student's samples: the identity in pixel space."""
    folder = find(teacher)
    if folder is None:
        return lambda y: y
    opened = functools.cache(open_autoencoder)  # not before it is needed

    def decode(y: Tensor) -> Tensor:
        with fast_float32():
            return opened(folder, device).decode(y.to(device))

    return decode


def shape_seen(data: Dataset, autoencoder: Path | None) -> tuple[int, ...]:
    """Return the shape that a teacher must have for these data. UserError where they do not divide."""
    if autoencoder is None or not _has_pictures(data):
        return tuple(data.shape)
    return read_geometry(autoencoder).latent_shape(tuple(data.shape))


def view(data: Dataset, autoencoder: Path | None) -> Dataset:
    """Return the data in the teacher's shape, without images where they would have to be encoded first."""
    if autoencoder is None or not _has_pictures(data):
        return data
    return Latents(data, shape_seen(data, autoencoder))


def _has_pictures(data: Dataset) -> bool:
    """Conditions alone, such as prompts, have the shape that the teacher makes."""
    return getattr(data, "has_images", True)
