"""A corpus of hostile pickles: name -> (bytes, a word that the refusal must have)."""

from __future__ import annotations

import builtins
import os
import pickle
import struct
from collections import OrderedDict

import numpy as np
import torch

from msdcli.nets import pickle_machine
from tests.nets.edm.edm_format import Call, Persistent, dumps

CANARY = "msd-canary-of-the-pickle-tests"


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def program(*parts: bytes, protocol: int = 4) -> bytes:
    return b"\x80" + bytes([protocol]) + b"".join(parts) + b"."


def stack_global(module: str, name: str) -> bytes:
    return short(module) + short(name) + b"\x93"


TOUCH = f"touch {CANARY}"
SYSTEM = stack_global("posix", "system")
RUN = short(TOUCH) + b"\x85R"  # (TOUCH,) REDUCE


def storage_bytes(numel: int, claimed: int) -> bytes:
    """A storage as torch.save writes it, but claiming another number of elements."""
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    number = b"\x8a\x08" + struct.pack("<q", claimed)
    ident = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + number + b"NtQ"
    keys = pickle.dumps(["0"], 2)
    return head + program(ident, protocol=2) + keys + struct.pack("<q", claimed) + bytes(4 * numel)


def bytes_arg(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


def load_storage(data: bytes) -> bytes:
    return stack_global("torch.storage", "_load_from_bytes") + bytes_arg(data) + b"\x85R"


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def tensor(shape: list[int], stride: list[int], offset: int = 0, storage: bytes | None = None) -> bytes:
    sizes, steps = (b"(" + b"".join(map(number, values)) + b"t" for values in (shape, stride))
    storage = load_storage(storage_bytes(4, 4)) if storage is None else storage
    return (
        stack_global("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + storage
        + number(offset)
        + sizes
        + steps
        + b"\x89}tR"
    )


def dtype(code: str) -> bytes:
    return stack_global("numpy", "dtype") + short(code) + b"\x89\x88\x87R"


def array(code: str, shape: list[int], data: bytes, order: str = "<") -> bytes:
    blank = stack_global("numpy._core.multiarray", "_reconstruct") + stack_global("numpy", "ndarray")
    blank += b"K\0\x85" + bytes_arg(b"b") + b"\x87R"
    kind = dtype(code) + b"(K\x03" + short(order) + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    sizes = b"(" + b"".join(map(number, shape)) + b"t"
    return blank + b"(K\x01" + sizes + kind + b"\x89" + bytes_arg(data) + b"tb"


def evil(function=os.system, *args: str) -> Call:
    return Call(function, *(args or (TOUCH,)))


HOSTILE: dict[str, tuple[bytes, str]] = {
    # Calls of what must not be called.
    **{f"os.system in protocol {p}": (pickle.dumps(evil(), p), "posix.system") for p in (2, 3, 4, 5)},
    **{f"os.system in protocol {p}": (pickle.dumps(evil(), p), "protocol 2") for p in (0, 1)},
    **{
        f"builtins.{f.__name__}": (dumps(evil(f, f"open({CANARY!r}, 'w')")), f".{f.__name__}")
        for f in (eval, exec, compile, getattr, open, __import__, builtins.breakpoint, print, setattr)
    },
    "import of a module": (
        dumps(evil(__import__("importlib").import_module, "antigravity")),
        "importlib.import_module",
    ),
    "torch.load": (dumps(evil(torch.load, "x")), "torch.serialization.load"),
    "numpy.load": (dumps(evil(np.load, "x")), "numpy.load"),
    "in a list": (dumps({"ema": [[evil()]]}), "posix.system"),
    "in a tuple": (dumps((1, (2, evil()))), "posix.system"),
    "as a dict's value": (dumps(OrderedDict(ema={"a": evil()})), "posix.system"),
    "as a constructor argument": (
        dumps({"ema": Persistent("EDMPrecond", {"_init_kwargs": {"a": evil()}})}),
        "posix.system",
    ),
    "as a parameter": (dumps({"ema": Persistent("Linear", {"_parameters": {"weight": evil()}})}), "posix.system"),
    "as a class's name": (dumps({"ema": Persistent(evil(), {})}), "posix.system"),
    "inside a tensor": (
        dumps(Call(torch._utils._rebuild_tensor_v2, evil(), 0, (1,), (1,), False, None)),
        "posix.system",
    ),
    "inside a storage's bytes": (program(load_storage(pickle.dumps(evil(), 2))), "posix.system"),
    "as a storage's type": (
        program(load_storage(storage_bytes(4, 4).replace(b"ctorch\nFloatStorage\n", b"cposix\nsystem\n"))),
        "posix.system",
    ),
    "a storage in a storage": (
        program(
            load_storage(storage_bytes(4, 4).replace(b"ctorch\nFloatStorage\n", b"ctorch.storage\n_load_from_bytes\n"))
        ),
        "torch.storage._load_from_bytes",
    ),
    "through the memo": (program(b"cposix\nsystem\n", b"\x94", b"0", b"h\0", RUN), "posix.system"),
    "name without a call": (program(SYSTEM), "posix.system"),
    "name in INST": (program(b"(" + short(TOUCH) + b"iposix\nsystem\n"), "INST"),
    "name in OBJ": (program(b"(" + stack_global("collections", "OrderedDict") + short(TOUCH) + b"o"), "OBJ"),
    "extension 1": (program(b"\x82\xf0", RUN), "EXT1"),
    "extension 2": (program(b"\x83\xf0\0", RUN), "EXT2"),
    "extension 4": (program(b"\x84\xf0\0\0\0", RUN), "EXT4"),
    "persistent id": (program(short("x"), b"Q"), "persistent id"),
    "persistent id as text": (program(b"Px\n"), "PERSID"),
    "keyword arguments": (program(stack_global("collections", "OrderedDict"), b")}", b"\x92"), "NEWOBJ_EX"),
    "out-of-band buffer": (program(b"\x97", protocol=5), "NEXT_BUFFER"),
    "dotted name of a known module": (
        program(stack_global("torch.storage", "_load_from_bytes.__globals__")),
        "__globals__",
    ),
    "dotted name of a known class": (program(stack_global("collections", "OrderedDict.__init__")), "__init__"),
    "submodule of a known module": (program(stack_global("torch", "os.system"), RUN), "torch.os.system"),
    "known name of another module": (program(stack_global("os", "OrderedDict")), "os.OrderedDict"),
    "name that is no text": (program(b"K\1K\2\x93"), "damaged"),
    "line without an end": (b"\x80\x04c" + b"x" * 600, "damaged"),
    # Misuse of what is known.
    "call of a name that is only a name": (program(stack_global("numpy", "ndarray"), b")R"), "numpy.ndarray"),
    "call of a container": (program(b"})R"), "a call of dict"),
    "new persistent object": (
        program(stack_global("torch_utils.persistence", "_reconstruct_persistent_obj"), b")\x81"),
        "a new",
    ),
    "new container with arguments": (program(stack_global("dnnlib.util", "EasyDict"), RUN[:-1], b"\x81"), "a new"),
    "call with too many arguments": (program(stack_global("collections", "OrderedDict"), RUN), "damaged"),
    "arguments that are no tuple": (program(stack_global("collections", "OrderedDict"), b"]R"), "damaged"),
    "state for a dict": (program(b"}}", b"b"), "a state for dict"),
    "state for a name": (program(stack_global("numpy", "ndarray"), b"}b"), "a state for numpy.ndarray"),
    "state for a record": (
        dumps(Persistent("Linear", {}))[:-1] + b"}" + short("__setstate__") + SYSTEM + b"sb.",
        "posix.system",
    ),
    "state for a full record": (dumps(Persistent("Linear", {"a": 1}))[:-1] + b"}b.", "a state for the record Linear"),
    "state for an array, twice": (program(array("f4", [1], bytes(4)), b"}b"), "a state for ArrayRecord"),
    "persistent object of another kind": (dumps(Persistent("x", {}, type="module")), "no class"),
    "persistent object without a state": (
        dumps(Call(Persistent("x", {}).__reduce__()[0], {"type": "class"})),
        "damaged",
    ),
    "key that is no text": (program(b"}K\1K\2s"), "damaged"),
    "key that cannot be hashed": (program(b"}]K\2s"), "damaged"),
    "key that hashes slowly": (program(b"}(", b"K\1\x85" * 5, b"K\2s"), "damaged"),
    "odd number of items": (program(b"}(", short("a"), b"u"), "damaged"),
    "item for something else": (program(b"]", short("a"), b"K\1s"), "damaged"),
    "set of numbers": (program(b"\x8f(K\1\x90"), "damaged"),
    # Sizes.
    "bytes of 4 EiB": (program(b"\x8e" + struct.pack("<Q", 2**62)), "truncated"),
    "bytes of 4 GiB": (program(b"B\xff\xff\xff\xff"), "truncated"),
    "bytearray of 8 EiB": (program(b"\x96" + struct.pack("<Q", 2**63), protocol=5), "truncated"),
    "text of 4 EiB": (program(b"\x8d" + struct.pack("<Q", 2**62)), "bytes of text"),
    "text of 32 MiB": (program(*[b"X" + struct.pack("<I", 2**20) + b"x" * 2**20 + b"0"] * 32), "bytes of text"),
    "whole number of 2 GiB": (program(b"\x8b\xff\xff\xff\x7f"), "whole number"),
    "whole number of -1 bytes": (program(b"\x8b\xff\xff\xff\xff"), "whole number"),
    "whole number of 255 bytes": (program(b"\x8a\xff" + b"\xff" * 255), "whole number"),
    "frame of 16 EiB": (program(b"\x95" + b"\xff" * 8), "damaged"),
    "memo entry that is not there": (program(b"j\xff\xff\xff\xff"), "damaged"),
    "nesting": (program(b"(" * 100_000), "nested"),
    "nested lists": (program(b"](" * 2000), "nested"),
    "opcodes": (program(b"\x8f" * (pickle_machine.MAX_OPCODES + 1)), "opcodes"),
    "opcodes in storages": (
        program(
            bytes_arg(storage_bytes(4, 4)),
            b"\x940",
            *[stack_global("torch.storage", "_load_from_bytes") + b"h\0\x85R0"] * 40_000,
        ),
        "opcodes",
    ),
    "storage that claims 2^50 numbers": (program(load_storage(storage_bytes(4, 2**50))), "storage"),
    "storage that claims fewer": (program(load_storage(storage_bytes(4, 2))), "storage"),
    "storage that claims -1": (program(load_storage(storage_bytes(4, -1))), "negative"),
    "storage without a head": (program(load_storage(b"\x80\x02K\1.")), "truncated"),
    "storage of another writer": (
        program(load_storage(storage_bytes(4, 4).replace(b"\x19\x2e", b"\x18\x2e", 1))),
        "torch.save",
    ),
    "tensor of 2^60 numbers": (program(tensor([2**60], [1])), "shape"),
    "tensor expanded by stride 0": (program(tensor([2**40], [0])), "shape"),
    "tensor of 2^40 dimensions' product": (program(tensor([2**30, 2**30, 2**30], [0, 0, 0])), "shape"),
    "tensor behind its storage": (program(tensor([2], [1], 3)), "shape"),
    "tensor that steps out": (program(tensor([2], [2**61])), "shape"),
    "tensor that steps back": (program(tensor([2], [-1], 3)), "negative"),
    "tensor of size -1": (program(tensor([-1], [1])), "negative"),
    "tensor before its storage": (program(tensor([1], [1], -1)), "negative"),
    "tensor of 100 dimensions": (program(tensor([1] * 100, [1] * 100)), "dimensions"),
    "tensor without strides": (program(tensor([1], [])), "without a storage"),
    "tensor without a storage": (program(tensor([1], [1], storage=b"}")), "without a storage"),
    "parameter without a tensor": (
        program(stack_global("torch._utils", "_rebuild_parameter"), b"}\x89}\x87R"),
        "parameter",
    ),
    "array of 2^60 numbers": (program(array("f4", [2**60], b"")), "numpy array"),
    "array of -1 numbers": (program(array("f4", [-1], b"")), "negative"),
    "array of 64 dimensions": (program(array("f4", [1] * 64, bytes(4))), "dimensions"),
    "array of objects": (program(array("O8", [1], bytes(8))), "plain number"),
    "array of objects as numpy writes it": (dumps(np.array([{}], dtype=object)), "plain number"),
    "array of a record type": (dumps(np.zeros(2, dtype=[("a", "f4")])), "plain number"),
    "array of text": (dumps(np.array(["a" * 5])), "plain number"),
    "big-endian array": (program(array("f4", [1], bytes(4), ">")), "big-endian"),
    "scalar of too many bytes": (
        program(stack_global("numpy._core.multiarray", "scalar"), dtype("f8"), bytes_arg(bytes(16)), b"\x86R"),
        "numpy array",
    ),
    # No pickle, or a broken one.
    "text": (b"hello\n", "protocol 2"),
    "torch.save's zip": (b"PK\x03\x04" + bytes(100), "torch.save"),
    "no STOP": (b"\x80\x04N", "truncated"),
    "STOP on an empty stack": (b"\x80\x04.", "damaged"),
    "POP on an empty stack": (program(b"0"), "damaged"),
    "tuple from an empty stack": (program(b"\x87"), "damaged"),
    "items without a mark": (program(b"]e"), "damaged"),
    "unknown opcode": (program(b"\xff"), "0xff"),
    "text that is no UTF-8": (program(b"\x8c\x01\xff"), "damaged"),
}
