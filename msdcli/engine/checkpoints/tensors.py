"""Named tensors on disk: safetensors, written in one piece, checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from msdcli.engine.checkpoints.files import damaged
from msdcli.errors import UserError
from msdcli.foreign import check_file
from msdcli.rundir import writing

HASH = "sha256"  # in a file's metadata
WRONG = "its content does not have its hash"


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None, *, hashed: bool = False
) -> None:
    """Write named tensors in one piece; `hashed` with a hash by which `load_tensors` knows them again."""
    with writing(path) as temporary:
        write_tensors(temporary, tensors, metadata or {}, hashed=hashed)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], *, hashed: bool) -> None:
    """Write named tensors to a file that nobody reads yet."""
    if hashed:
        metadata = metadata | {HASH: digest(sorted(tensors.items()), metadata)}
    try:
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, path, metadata=metadata or None)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from None


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read named tensors and the file's metadata. UserError if the file is missing, DamagedError if it is damaged."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            # Clones: memory of our own, aligned as a fresh tensor's is, so that a resumed run takes the same kernels.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error) from None
    wanted = metadata.pop(HASH, None)
    if wanted is not None and digest(sorted(tensors.items()), metadata) != wanted:
        raise damaged(path, WRONG)
    return tensors, metadata


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes in a file by name, without reading its tensors. Errors are those of `load_tensors`."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error) from None


def check_hash(path: Path) -> None:
    """Compare a file's content with its hash, one tensor in memory at a time. DamagedError where it differs."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            wanted = metadata.pop(HASH)
            found = digest(((name, file.get_tensor(name)) for name in sorted(file.keys())), metadata)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise damaged(path, error) from None
    if found != wanted:
        raise damaged(path, WRONG)


def digest(tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]) -> str:
    """Return a hash of metadata and of tensors in the order of their names."""
    found = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def load_weights(net: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy tensors into a network: every name and shape must fit."""
    check_fit(net, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, path)
    for name, tensor in net.state_dict().items():
        tensor.copy_(tensors[name])


def check_fit(net: nn.Module, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise UserError unless tensors of these names and shapes are a network's."""
    own = net.state_dict()
    missing, extra = sorted(own.keys() - shapes.keys()), sorted(shapes.keys() - own.keys())
    if missing or extra:
        names = "; ".join(f"{what} {', '.join(n[:3])}" for what, n in (("missing", missing), ("unknown", extra)) if n)
        raise UserError(f"{path} does not fit the network: {names}")
    for name, tensor in own.items():
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(f"{path}: {name} has shape {[*shapes[name]]}, the network wants {[*tensor.shape]}")
