"""Read the pickles of EDM and EDM2 without running anything in them: tensors, containers and constructor arguments.

The names that such checkpoints need (`NAMES`) stand for functions of this file that build inert records; tensors stay
views of the memory-mapped file until `TensorRecord.read`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdcli.errors import UserError
from msdcli.nets import strangers
from msdcli.nets.pickle_machine import (
    DAMAGED,
    PROTO,
    Machine,
    Record,
    RefusedError,
    expect,
    mapped,
    names,
    shape_of,
    whole,
)


@dataclass(frozen=True, eq=False, repr=False)
class Storage:
    """The bytes of a torch storage, still in the file."""

    data: memoryview
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return len(self.data) // self.dtype.itemsize


@dataclass(frozen=True, eq=False, repr=False)
class TensorRecord:
    """A tensor that has not been read; its shape is known to fit into its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Copy the tensor out of the file."""
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype, device="cpu")
        # A bytearray, because torch wants aligned and writable memory and the file's is neither.
        flat = torch.frombuffer(bytearray(self.storage.data), dtype=self.dtype)
        return flat.as_strided(self.shape, self.stride, self.offset)


@dataclass(frozen=True, eq=False, repr=False)
class Pickle:
    """What a file holds, with the file's name, size and SHA-256."""

    content: Any
    file: str
    size: int
    sha256: str


def read_pickle(path: Path | str) -> Pickle:
    """Read a checkpoint's pickle as records and containers. Raises UserError naming whatever it refuses."""
    path = Path(path)
    data = mapped(path)
    if data[0] != PROTO and (found := strangers.of_file(path)) is not None:
        raise UserError(f"{path} {found[0]}", hint=found[1])
    machine = Machine(data, NAMES)
    try:
        if data[0] != PROTO:
            raise RefusedError("no pickle of protocol 2 or newer")
        content = machine.load()
    except RefusedError as error:
        raise UserError(
            f"{path} was refused: it holds {error}",
            hint="an EDM or EDM2 checkpoint holds tensors, containers and constructor arguments; nothing was run",
        ) from None
    except DAMAGED:
        raise UserError(f"{path} is damaged: its pickle makes no sense at byte {machine.at}") from None
    return Pickle(content, path.name, len(data), hashlib.sha256(data).hexdigest())


def _persistent_object(machine: Machine, meta: dict[str, Any]) -> Record:
    """A torch_utils.persistence object: its class's name and its state; the source code that comes along is ignored."""
    if expect(dict, meta).get("type") != "class":
        raise RefusedError("a persistent object that is no class")
    return Record(expect(str, meta["class_name"]), expect(dict, meta["state"]))


def _rebuild_tensor(machine: Machine, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> TensorRecord:
    """torch._utils._rebuild_tensor_v2, refusing a view that leaves its storage or is larger than it."""
    offset, shape, stride = whole(offset), shape_of(shape), shape_of(stride)
    if type(storage) is not Storage or len(shape) != len(stride):
        raise RefusedError("a tensor without a storage")
    numel = math.prod(shape)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if numel > storage.numel or (numel and last >= storage.numel):
        raise RefusedError(f"a tensor of shape {list(shape)} on a storage of {storage.numel} numbers")
    return TensorRecord(storage, offset, shape, stride)


def _rebuild_parameter(machine: Machine, tensor: Any, requires_grad: Any, hooks: Any) -> TensorRecord:
    if type(tensor) is not TensorRecord:
        raise RefusedError("a parameter without a tensor")
    return tensor


def _storage(machine: Machine, data: Any) -> Storage:
    """torch.storage._load_from_bytes: a storage as the old, not zipped form of torch.save writes it.

    That is five pickles (magic number, version, machine, the storage's persistent id, its key) and then the number
    of elements and the elements themselves.
    """
    inner = Machine(expect(memoryview, data), _STORAGE_NAMES, _storage_id, machine.budget)
    magic, version, system = inner.load(), inner.load(), expect(dict, inner.load())
    if (magic, version, system["little_endian"]) != (0x1950A86A20F9469CFC6C, 1001, True):
        raise RefusedError("a storage that torch.save did not write")
    (dtype, numel), keys = expect(tuple, inner.load()), expect(list, inner.load())
    length = inner.unsigned(8)
    rest = inner.take(len(data) - inner.at)
    if len(keys) != 1 or length != numel or len(rest) != numel * dtype.itemsize:
        raise RefusedError(f"a storage of {len(rest)} bytes that claims to hold {numel} numbers")
    return Storage(rest, dtype)


def _storage_id(value: Any) -> tuple[torch.dtype, int]:
    kind, dtype, _key, _location, numel = expect(tuple, value)[:5]
    if kind != "storage" or type(dtype) is not torch.dtype:
        raise RefusedError("a persistent id that is no storage")
    return dtype, whole(numel)


_STORAGE_TYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_STORAGE_NAMES: Mapping[tuple[str, str], Any] = {("torch", name): dtype for name, dtype in _STORAGE_TYPES.items()}

_ENTRIES: list[tuple[str, str, Callable[..., Any] | None, Callable[..., Any] | None]] = [
    ("torch_utils.persistence", "_reconstruct_persistent_obj", _persistent_object, None),
    ("collections", "OrderedDict", lambda machine: {}, None),
    ("dnnlib.util", "EasyDict", lambda machine: {}, dict),
    ("torch._utils", "_rebuild_tensor_v2", _rebuild_tensor, None),
    ("torch._utils", "_rebuild_parameter", _rebuild_parameter, None),
    ("torch.storage", "_load_from_bytes", _storage, None),
    ("torch.nn.modules.container", "ModuleDict", None, lambda: Record("ModuleDict", {}, waits=True)),
    ("torch.nn.modules.container", "ModuleList", None, lambda: Record("ModuleList", {}, waits=True)),
]
NAMES = names(_ENTRIES)
