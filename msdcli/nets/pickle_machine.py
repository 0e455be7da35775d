"""A pickle machine that knows data only: a file is read as records and plain arrays, and nothing in it is run.

Python's unpickler imports and calls whatever a file names. This one can do neither: the few names that a format needs
stand for functions that build inert records, and every other name, opcode or size is refused. Arrays are views of the
memory-mapped file, and the number of opcodes is limited, so reading allocates little however the file lies about sizes.
"""

from __future__ import annotations

import math
import mmap
import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from msdcli.errors import UserError
from msdcli.foreign import check_file

# The ADM network for ImageNet-64, the largest of EDM's, takes 0.09 million opcodes and 0.1 MB of text.
MAX_OPCODES = 1_000_000
MAX_TEXT_BYTES = 16 * 2**20
MAX_NESTING = 500
MAX_INT_BYTES = 16
MAX_DIMENSIONS = 8

PROTO, _STOP = 0x80, 0x2E


class RefusedError(Exception):
    """What the file holds that it may not hold; its reader turns it into a UserError with the file's name."""


# What a pickle that makes no sense raises in the machine.
DAMAGED = (IndexError, KeyError, TypeError, ValueError, OverflowError, AttributeError, struct.error)


@dataclass(eq=False, repr=False)
class Record:
    """A pickled object as inert data. No generated repr or eq: a file can nest records to any depth, or in a ring."""

    class_name: str
    state: dict[str, Any]
    waits: bool = False  # for its state, which a later opcode brings


@dataclass(eq=False, repr=False)
class ArrayRecord:
    """A numpy array: a read-only view of the file; None between the two opcodes that make one."""

    array: np.ndarray | None = None


def mapped(path: Path) -> memoryview:
    """The file as a read-only mapping, which lives as long as the records that refer to it."""
    check_file(path)
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError:
        raise UserError(f"{path} is empty") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


@dataclass
class Budget:
    """How much a file may still make us do; shared with the pickles inside it."""

    opcodes: int = field(default_factory=lambda: MAX_OPCODES)
    text: int = field(default_factory=lambda: MAX_TEXT_BYTES)

    def spend_text(self, count: int) -> None:
        self.text -= count
        if self.text < 0:
            raise RefusedError("more bytes of text than it needs")


@dataclass(frozen=True, eq=False)
class Name:
    """A name that a file may use: what a call of it builds, if it may be called. Both get the machine first."""

    name: str
    call: Callable[..., Any] | None = None
    new: Callable[..., Any] | None = None


@dataclass(eq=False)
class Machine:
    """The stack machine that a pickle is a program for (see the standard library's pickletools)."""

    data: memoryview
    names: Mapping[tuple[str, str], Any]
    persistent: Callable[[Any], Any] | None = None
    budget: Budget = field(default_factory=Budget)
    handlers: Mapping[int, Callable[[Machine], Any]] = field(default_factory=lambda: HANDLERS)
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
                raise RefusedError("more opcodes than it needs")
            handler = self.handlers.get(code)
            if handler is None:
                raise RefusedError(f"the opcode {opcode_name(code)} at byte {self.at - 1}")
            handler(self)
        return self.stack.pop()

    # Reading.

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise RefusedError(f"an end in the middle of a value at byte {self.at} (is the file truncated?)")
        self.at += count
        return self.data[self.at - count : self.at]

    def unsigned(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def text(self, width: int) -> str:
        count = self.unsigned(width)
        self.budget.spend_text(count)
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
            raise RefusedError(f"containers nested more than {MAX_NESTING} deep")
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
        expect(list, self.stack[-1]).extend(items)

    def add(self, items: list[Any]) -> None:
        expect(set, self.stack[-1]).update(expect(str, item) for item in items)

    def set_items(self, items: list[Any]) -> None:
        target = expect(dict, self.stack[-1])
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[expect(str, key)] = value

    def pop_tuple(self, count: int) -> None:
        self.stack[-count:] = [tuple(self.stack[-count:])] if len(self.stack) >= count else _underflow()

    # Names, and the only four ways to use one.

    def name(self, module: str, name: str) -> None:
        known = self.names.get((expect(str, module), expect(str, name)))
        if known is None:
            raise RefusedError(f"the name {ascii(f'{module}.{name}')[1:-1][:200]}")
        self.stack.append(known)

    def op_stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(module, name)

    def op_reduce(self) -> None:
        args, name = expect(tuple, self.stack.pop()), self.stack.pop()
        if not isinstance(name, Name) or name.call is None:
            raise RefusedError(f"a call of {_describe(name)}")
        self.stack.append(name.call(self, *args))

    def op_newobj(self) -> None:
        args, name = self.stack.pop(), self.stack.pop()
        if not isinstance(name, Name) or name.new is None or args != ():
            raise RefusedError(f"a new {_describe(name)}")
        self.stack.append(name.new())

    def op_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, ArrayRecord) and target.array is None:
            _, shape, dtype, fortran, data = expect(tuple, state)
            target.array = _array(data, dtype, shape, "F" if fortran else "C")
        elif isinstance(target, np.dtype):
            if expect(tuple, state)[1] not in ("<", "|", "="):
                raise RefusedError("a big-endian number")
        elif isinstance(target, Record) and target.waits and not target.state:
            target.state.update(expect(dict, state))
        else:
            raise RefusedError(f"a state for {_describe(target)}")

    def op_binpersid(self) -> None:
        if self.persistent is None:
            raise RefusedError("a persistent id")
        self.stack.append(self.persistent(self.stack.pop()))


def expect(kind: type, value: Any) -> Any:
    """The value, if it is exactly of this type: a subclass could bring methods of its own."""
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}")
    return value


def _underflow() -> list[Any]:
    raise IndexError("stack underflow")


def _describe(value: Any) -> str:
    if isinstance(value, Name):
        return value.name
    return f"the record {ascii(value.class_name)[1:-1][:80]}" if isinstance(value, Record) else type(value).__name__


def opcode_name(code: int) -> str:
    return next((opcode.name for opcode in pickletools.opcodes if ord(opcode.code) == code), f"0x{code:02x}")


# What calls of the known names build.


def whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise RefusedError("a negative or fractional size")
    return value


def shape_of(values: Any) -> tuple[int, ...]:
    if len(expect(tuple, values)) > MAX_DIMENSIONS:
        raise RefusedError(f"an array of more than {MAX_DIMENSIONS} dimensions")
    return tuple(whole(value) for value in values)


def _dtype(machine: Machine, code: Any, *rest: Any) -> Any:
    if code not in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"):
        raise RefusedError("a numpy type that is no plain number")
    return np.dtype("<" + code)


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    shape = shape_of(shape)
    if not isinstance(dtype, np.dtype) or math.prod(shape) * dtype.itemsize != len(expect(memoryview, data)):
        raise RefusedError(f"a numpy array of shape {list(shape)} that its data do not fill")
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _scalar(machine: Machine, dtype: Any, data: Any) -> Any:
    return _array(data, dtype, (), "C").item()


def _blank_array(machine: Machine, kind: Any, shape: Any, code: Any) -> ArrayRecord:
    return ArrayRecord()


def _array_from_buffer(machine: Machine, data: Any, dtype: Any, shape: Any, order: Any) -> ArrayRecord:
    return ArrayRecord(_array(data, dtype, shape, order))


_ARRAYS: list[tuple[str, str, Callable[..., Any] | None]] = [
    ("numpy", "dtype", _dtype),
    ("numpy", "ndarray", None),
    # numpy 2 renamed its core.
    *(
        (f"numpy.{core}.{module}", name, call)
        for core in ("core", "_core")
        for module, name, call in (
            ("multiarray", "scalar", _scalar),
            ("multiarray", "_reconstruct", _blank_array),
            ("numeric", "_frombuffer", _array_from_buffer),
        )
    ),
]


def names(
    entries: list[tuple[str, str, Callable[..., Any] | None, Callable[..., Any] | None]],
) -> dict[tuple[str, str], Name]:
    """Names that a file may use: (module, name, what a call builds, what a new one is), and numpy's plain arrays."""
    known = [*entries, *((module, name, call, None) for module, name, call in _ARRAYS)]
    return {(module, name): Name(f"{module}.{name}", call, new) for module, name, call, new in known}


def push(make: Callable[[Machine], Any]) -> Callable[[Machine], None]:
    def handler(machine: Machine) -> None:
        value = make(machine)  # may exchange machine.stack
        machine.stack.append(value)

    return handler


def _integer(width: int) -> Callable[[Machine], Any]:
    def read(machine: Machine) -> int:
        count = machine.unsigned(width)
        if count > MAX_INT_BYTES:
            raise RefusedError(f"a whole number of {count} bytes")
        return int.from_bytes(machine.take(count), "little", signed=True)

    return read


def _global(machine: Machine) -> None:
    module = machine.line()
    machine.name(module, machine.line())


_BY_NAME: dict[str, Callable[[Machine], Any]] = {
    "PROTO": lambda m: m.take(1),
    "FRAME": lambda m: m.take(8),
    "MARK": Machine.op_mark,
    "POP": lambda m: m.stack.pop(),
    "POP_MARK": lambda m: m.items(),
    "NONE": push(lambda m: None),
    "NEWTRUE": push(lambda m: True),
    "NEWFALSE": push(lambda m: False),
    "BININT": push(lambda m: int.from_bytes(m.take(4), "little", signed=True)),
    "BININT1": push(lambda m: m.unsigned(1)),
    "BININT2": push(lambda m: m.unsigned(2)),
    "LONG1": push(_integer(1)),
    "LONG4": push(_integer(4)),
    "BINFLOAT": push(lambda m: struct.unpack(">d", m.take(8))[0]),
    "SHORT_BINUNICODE": push(lambda m: m.text(1)),
    "BINUNICODE": push(lambda m: m.text(4)),
    "BINUNICODE8": push(lambda m: m.text(8)),
    "SHORT_BINBYTES": push(lambda m: m.take(m.unsigned(1))),
    "BINBYTES": push(lambda m: m.take(m.unsigned(4))),
    "BINBYTES8": push(lambda m: m.take(m.unsigned(8))),
    "BYTEARRAY8": push(lambda m: m.take(m.unsigned(8))),
    "EMPTY_TUPLE": push(lambda m: ()),
    "EMPTY_LIST": push(lambda m: []),
    "EMPTY_DICT": push(lambda m: {}),
    "EMPTY_SET": push(lambda m: set()),
    "TUPLE1": lambda m: m.pop_tuple(1),
    "TUPLE2": lambda m: m.pop_tuple(2),
    "TUPLE3": lambda m: m.pop_tuple(3),
    "TUPLE": push(lambda m: tuple(m.items())),
    "APPEND": lambda m: m.append([m.stack.pop()]),
    "APPENDS": lambda m: m.append(m.items()),
    "ADDITEMS": lambda m: m.add(m.items()),
    "SETITEM": lambda m: m.set_items([m.stack.pop(), m.stack.pop()][::-1]),
    "SETITEMS": lambda m: m.set_items(m.items()),
    "MEMOIZE": Machine.op_memoize,
    "BINPUT": lambda m: m.put(1),
    "LONG_BINPUT": lambda m: m.put(4),
    "BINGET": lambda m: m.get(1),
    "LONG_BINGET": lambda m: m.get(4),
    "GLOBAL": _global,
    "STACK_GLOBAL": Machine.op_stack_global,
    "REDUCE": Machine.op_reduce,
    "NEWOBJ": Machine.op_newobj,
    "BUILD": Machine.op_build,
    "BINPERSID": Machine.op_binpersid,
}


def handlers(by_name: Mapping[str, Callable[[Machine], Any]]) -> dict[int, Callable[[Machine], Any]]:
    """Opcodes by their byte, from what each of them does by its name in pickletools."""
    return {ord(opcode.code): by_name[opcode.name] for opcode in pickletools.opcodes if opcode.name in by_name}


HANDLERS: dict[int, Callable[[Machine], Any]] = handlers(_BY_NAME)
