"""Read the pickles of EDM and EDM2 without running anything in them: a pickle machine that knows data only.

Python's unpickler imports and calls whatever a file names. This one can do neither: the few names that such
checkpoints need (`NAMES`) stand for functions of this file that build inert records, and every other name, opcode
or size is refused. Tensors stay views of the memory-mapped file until `TensorRecord.read`, and the number of
opcodes is limited, so reading allocates little however the file lies about sizes.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msdcli.errors import UserError
from msdcli.foreign import check_file

# The ADM network for ImageNet-64, the largest of EDM's, takes 0.09 million opcodes and 0.1 MB of text.
MAX_OPCODES = 1_000_000
MAX_TEXT_BYTES = 16 * 2**20
MAX_NESTING = 500
MAX_INT_BYTES = 16
MAX_DIMENSIONS = 8

_PROTO, _STOP = 0x80, 0x2E


class _RefusedError(Exception):
    """What the file holds that it may not hold; `read_pickle` turns it into a UserError with the file's name."""


@dataclass(eq=False, repr=False)
class Record:
    """A pickled object as inert data. No generated repr or eq: a file can nest records to any depth, or in a ring."""

    class_name: str
    state: dict[str, Any]


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


@dataclass(eq=False, repr=False)
class ArrayRecord:
    """A numpy array: a read-only view of the file; None between the two opcodes that make one."""

    array: np.ndarray | None = None


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
    data = _map(path)
    machine = _Machine(data, NAMES)
    try:
        if data[0] != _PROTO:
            raise _RefusedError("no pickle of protocol 2 or newer")
        content = machine.load()
    except _RefusedError as error:
        raise UserError(
            f"{path} was refused: it holds {error}",
            hint="an EDM or EDM2 checkpoint holds tensors, containers and constructor arguments; nothing was run",
        ) from None
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, AttributeError, struct.error):
        raise UserError(f"{path} is damaged: its pickle makes no sense at byte {machine.at}") from None
    return Pickle(content, path.name, len(data), hashlib.sha256(data).hexdigest())


def _map(path: Path) -> memoryview:
    """The file as a read-only mapping, which lives as long as the records that refer to it."""
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    check_file(path)
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError:
        raise UserError(f"{path} is empty") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


@dataclass
class _Budget:
    """How much a file may still make us do; shared with the pickles inside it."""

    opcodes: int = field(default_factory=lambda: MAX_OPCODES)
    text: int = field(default_factory=lambda: MAX_TEXT_BYTES)


@dataclass(frozen=True, eq=False)
class _Name:
    """A name that a file may use: what a call of it builds, if it may be called. Both get the machine first."""

    name: str
    call: Callable[..., Any] | None = None
    new: Callable[..., Any] | None = None


@dataclass(eq=False)
class _Machine:
    """The stack machine that a pickle is a program for (see the standard library's pickletools)."""

    data: memoryview
    names: Mapping[tuple[str, str], Any]
    persistent: Callable[[Any], Any] | None = None
    budget: _Budget = field(default_factory=_Budget)
    at: int = 0
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def load(self) -> Any:
        """Run one pickle to its STOP and return what it built; `at` is then behind it."""
        self.stack, self.marks, self.memo = [], [], {}
        while (code := self.take(1)[0]) != _STOP:
            self.budget.opcodes -= 1
            if self.budget.opcodes < 0:
                raise _RefusedError(f"more than {MAX_OPCODES:,} opcodes")
            handler = _HANDLERS.get(code)
            if handler is None:
                raise _RefusedError(f"the opcode {_opcode_name(code)} at byte {self.at - 1}")
            handler(self)
        return self.stack.pop()

    # Reading.

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise _RefusedError(f"an end in the middle of a value at byte {self.at} (is the file truncated?)")
        self.at += count
        return self.data[self.at - count : self.at]

    def unsigned(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def text(self, width: int) -> str:
        count = self.unsigned(width)
        self.budget.text -= count
        if self.budget.text < 0:
            raise _RefusedError(f"more than {MAX_TEXT_BYTES:,} bytes of text")
        return str(self.take(count), "utf-8")

    def line(self) -> str:
        end = bytes(self.data[self.at : self.at + 256]).index(b"\n")
        return str(self.take(end + 1)[:-1], "utf-8")

    # Stack and memo.

    def items(self) -> list[Any]:
        """Pop everything above the topmost mark."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def op_mark(self) -> None:
        if len(self.marks) >= MAX_NESTING:
            raise _RefusedError(f"containers nested more than {MAX_NESTING} deep")
        self.marks.append(self.stack)
        self.stack = []

    def op_memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def put(self, width: int) -> None:
        self.memo[self.unsigned(width)] = self.stack[-1]

    def get(self, width: int) -> None:
        self.stack.append(self.memo[self.unsigned(width)])

    # Containers. Keys are text only: hashing anything else can be made slow.

    def append(self, items: list[Any]) -> None:
        _expect(list, self.stack[-1]).extend(items)

    def add(self, items: list[Any]) -> None:
        _expect(set, self.stack[-1]).update(_expect(str, item) for item in items)

    def set_items(self, items: list[Any]) -> None:
        target = _expect(dict, self.stack[-1])
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_expect(str, key)] = value

    def pop_tuple(self, count: int) -> None:
        self.stack[-count:] = [tuple(self.stack[-count:])] if len(self.stack) >= count else _underflow()

    # Names, and the only four ways to use one.

    def name(self, module: str, name: str) -> None:
        known = self.names.get((_expect(str, module), _expect(str, name)))
        if known is None:
            raise _RefusedError(f"the name {ascii(f'{module}.{name}')[1:-1][:200]}")
        self.stack.append(known)

    def op_stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(module, name)

    def op_reduce(self) -> None:
        args, name = _expect(tuple, self.stack.pop()), self.stack.pop()
        if not isinstance(name, _Name) or name.call is None:
            raise _RefusedError(f"a call of {_describe(name)}")
        self.stack.append(name.call(self, *args))

    def op_newobj(self) -> None:
        args, name = self.stack.pop(), self.stack.pop()
        if not isinstance(name, _Name) or name.new is None or args != ():
            raise _RefusedError(f"a new {_describe(name)}")
        self.stack.append(name.new())

    def op_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, ArrayRecord) and target.array is None:
            _, shape, dtype, fortran, data = _expect(tuple, state)
            target.array = _array(data, dtype, shape, "F" if fortran else "C")
        elif isinstance(target, np.dtype):
            if _expect(tuple, state)[1] not in ("<", "|", "="):
                raise _RefusedError("a big-endian number")
        elif isinstance(target, Record) and target.class_name in _CONTAINERS and not target.state:
            target.state.update(_expect(dict, state))
        else:
            raise _RefusedError(f"a state for {_describe(target)}")

    def op_binpersid(self) -> None:
        if self.persistent is None:
            raise _RefusedError("a persistent id")
        self.stack.append(self.persistent(self.stack.pop()))


def _expect(kind: type, value: Any) -> Any:
    """The value, if it is exactly of this type: a subclass could bring methods of its own."""
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}")
    return value


def _underflow() -> list[Any]:
    raise IndexError("stack underflow")


def _describe(value: Any) -> str:
    if isinstance(value, _Name):
        return value.name
    return f"the record {ascii(value.class_name)[1:-1][:80]}" if isinstance(value, Record) else type(value).__name__


def _opcode_name(code: int) -> str:
    return next((opcode.name for opcode in pickletools.opcodes if ord(opcode.code) == code), f"0x{code:02x}")


# What calls of the known names build.


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise _RefusedError("a negative or fractional size")
    return value


def _shape(values: Any) -> tuple[int, ...]:
    if len(_expect(tuple, values)) > MAX_DIMENSIONS:
        raise _RefusedError(f"an array of more than {MAX_DIMENSIONS} dimensions")
    return tuple(_whole(value) for value in values)


def _persistent_object(machine: _Machine, meta: dict[str, Any]) -> Record:
    """A torch_utils.persistence object: its class's name and its state; the source code that comes along is ignored."""
    if _expect(dict, meta).get("type") != "class":
        raise _RefusedError("a persistent object that is no class")
    return Record(_expect(str, meta["class_name"]), _expect(dict, meta["state"]))


def _rebuild_tensor(machine: _Machine, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> TensorRecord:
    """torch._utils._rebuild_tensor_v2, refusing a view that leaves its storage or is larger than it."""
    offset, shape, stride = _whole(offset), _shape(shape), _shape(stride)
    if type(storage) is not Storage or len(shape) != len(stride):
        raise _RefusedError("a tensor without a storage")
    numel = math.prod(shape)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if numel > storage.numel or (numel and last >= storage.numel):
        raise _RefusedError(f"a tensor of shape {list(shape)} on a storage of {storage.numel} numbers")
    return TensorRecord(storage, offset, shape, stride)


def _rebuild_parameter(machine: _Machine, tensor: Any, requires_grad: Any, hooks: Any) -> TensorRecord:
    if type(tensor) is not TensorRecord:
        raise _RefusedError("a parameter without a tensor")
    return tensor


def _dtype(machine: _Machine, code: Any, *rest: Any) -> Any:
    if code not in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"):
        raise _RefusedError("a numpy type that is no plain number")
    return np.dtype("<" + code)


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    shape = _shape(shape)
    if not isinstance(dtype, np.dtype) or math.prod(shape) * dtype.itemsize != len(_expect(memoryview, data)):
        raise _RefusedError(f"a numpy array of shape {list(shape)} that its data do not fill")
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _scalar(machine: _Machine, dtype: Any, data: Any) -> Any:
    return _array(data, dtype, (), "C").item()


def _blank_array(machine: _Machine, kind: Any, shape: Any, code: Any) -> ArrayRecord:
    return ArrayRecord()


def _array_from_buffer(machine: _Machine, data: Any, dtype: Any, shape: Any, order: Any) -> ArrayRecord:
    return ArrayRecord(_array(data, dtype, shape, order))


def _storage(machine: _Machine, data: Any) -> Storage:
    """torch.storage._load_from_bytes: a storage as the old, not zipped form of torch.save writes it.

    That is five pickles (magic number, version, machine, the storage's persistent id, its key) and then the number
    of elements and the elements themselves.
    """
    inner = _Machine(_expect(memoryview, data), _STORAGE_NAMES, _storage_id, machine.budget)
    magic, version, system = inner.load(), inner.load(), _expect(dict, inner.load())
    if (magic, version, system["little_endian"]) != (0x1950A86A20F9469CFC6C, 1001, True):
        raise _RefusedError("a storage that torch.save did not write")
    (dtype, numel), keys = _expect(tuple, inner.load()), _expect(list, inner.load())
    length = inner.unsigned(8)
    rest = inner.take(len(data) - inner.at)
    if len(keys) != 1 or length != numel or len(rest) != numel * dtype.itemsize:
        raise _RefusedError(f"a storage of {len(rest)} bytes that claims to hold {numel} numbers")
    return Storage(rest, dtype)


def _storage_id(value: Any) -> tuple[torch.dtype, int]:
    kind, dtype, _key, _location, numel = _expect(tuple, value)[:5]
    if kind != "storage" or type(dtype) is not torch.dtype:
        raise _RefusedError("a persistent id that is no storage")
    return dtype, _whole(numel)


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

_CONTAINERS = ("ModuleDict", "ModuleList")

_ENTRIES: list[tuple[str, str, Callable[..., Any] | None, Callable[..., Any] | None]] = [
    ("torch_utils.persistence", "_reconstruct_persistent_obj", _persistent_object, None),
    ("collections", "OrderedDict", lambda machine: {}, None),
    ("dnnlib.util", "EasyDict", lambda machine: {}, dict),
    ("torch._utils", "_rebuild_tensor_v2", _rebuild_tensor, None),
    ("torch._utils", "_rebuild_parameter", _rebuild_parameter, None),
    ("torch.storage", "_load_from_bytes", _storage, None),
    ("torch.nn.modules.container", "ModuleDict", None, lambda: Record("ModuleDict", {})),
    ("torch.nn.modules.container", "ModuleList", None, lambda: Record("ModuleList", {})),
    ("numpy", "dtype", _dtype, None),
    ("numpy", "ndarray", None, None),
    # numpy 2 renamed its core.
    ("numpy.core.multiarray", "scalar", _scalar, None),
    ("numpy._core.multiarray", "scalar", _scalar, None),
    ("numpy.core.multiarray", "_reconstruct", _blank_array, None),
    ("numpy._core.multiarray", "_reconstruct", _blank_array, None),
    ("numpy.core.numeric", "_frombuffer", _array_from_buffer, None),
    ("numpy._core.numeric", "_frombuffer", _array_from_buffer, None),
]
NAMES = {(module, name): _Name(f"{module}.{name}", call, new) for module, name, call, new in _ENTRIES}


def _push(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def handler(machine: _Machine) -> None:
        value = make(machine)  # may exchange machine.stack
        machine.stack.append(value)

    return handler


def _integer(width: int) -> Callable[[_Machine], Any]:
    def read(machine: _Machine) -> int:
        count = machine.unsigned(width)
        if count > MAX_INT_BYTES:
            raise _RefusedError(f"a whole number of {count} bytes")
        return int.from_bytes(machine.take(count), "little", signed=True)

    return read


def _global(machine: _Machine) -> None:
    module = machine.line()
    machine.name(module, machine.line())


_BY_NAME: dict[str, Callable[[_Machine], Any]] = {
    "PROTO": lambda m: m.take(1),
    "FRAME": lambda m: m.take(8),
    "MARK": _Machine.op_mark,
    "POP": lambda m: m.stack.pop(),
    "POP_MARK": lambda m: m.items(),
    "NONE": _push(lambda m: None),
    "NEWTRUE": _push(lambda m: True),
    "NEWFALSE": _push(lambda m: False),
    "BININT": _push(lambda m: int.from_bytes(m.take(4), "little", signed=True)),
    "BININT1": _push(lambda m: m.unsigned(1)),
    "BININT2": _push(lambda m: m.unsigned(2)),
    "LONG1": _push(_integer(1)),
    "LONG4": _push(_integer(4)),
    "BINFLOAT": _push(lambda m: struct.unpack(">d", m.take(8))[0]),
    "SHORT_BINUNICODE": _push(lambda m: m.text(1)),
    "BINUNICODE": _push(lambda m: m.text(4)),
    "BINUNICODE8": _push(lambda m: m.text(8)),
    "SHORT_BINBYTES": _push(lambda m: m.take(m.unsigned(1))),
    "BINBYTES": _push(lambda m: m.take(m.unsigned(4))),
    "BINBYTES8": _push(lambda m: m.take(m.unsigned(8))),
    "BYTEARRAY8": _push(lambda m: m.take(m.unsigned(8))),
    "EMPTY_TUPLE": _push(lambda m: ()),
    "EMPTY_LIST": _push(lambda m: []),
    "EMPTY_DICT": _push(lambda m: {}),
    "EMPTY_SET": _push(lambda m: set()),
    "TUPLE1": lambda m: m.pop_tuple(1),
    "TUPLE2": lambda m: m.pop_tuple(2),
    "TUPLE3": lambda m: m.pop_tuple(3),
    "TUPLE": _push(lambda m: tuple(m.items())),
    "APPEND": lambda m: m.append([m.stack.pop()]),
    "APPENDS": lambda m: m.append(m.items()),
    "ADDITEMS": lambda m: m.add(m.items()),
    "SETITEM": lambda m: m.set_items([m.stack.pop(), m.stack.pop()][::-1]),
    "SETITEMS": lambda m: m.set_items(m.items()),
    "MEMOIZE": _Machine.op_memoize,
    "BINPUT": lambda m: m.put(1),
    "LONG_BINPUT": lambda m: m.put(4),
    "BINGET": lambda m: m.get(1),
    "LONG_BINGET": lambda m: m.get(4),
    "GLOBAL": _global,
    "STACK_GLOBAL": _Machine.op_stack_global,
    "REDUCE": _Machine.op_reduce,
    "NEWOBJ": _Machine.op_newobj,
    "BUILD": _Machine.op_build,
    "BINPERSID": _Machine.op_binpersid,
}
_HANDLERS = {ord(opcode.code): _BY_NAME[opcode.name] for opcode in pickletools.opcodes if opcode.name in _BY_NAME}
