"""A device that is not here: the meta device in its place, with numbers in its memory, where every operation is watched
as a GPU would be.

A tensor on it (`Remote`) says `device=meta` and keeps its numbers in a tensor of the host that nobody else sees, so
whatever runs on a GPU runs on it: losses, optimizers, samplers, feature networks, distances. Inside `FakeDevice` every
read of its numbers and every copy from or to the host is written down; `watched` refuses them.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# What a GPU is waited for: its values, or a shape that depends on them.
READS = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount, aten._linalg_check_errors),
    *(aten.unique_dim, aten._unique2, aten.unique_consecutive, aten.repeat_interleave),
}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
COPIES = {aten._to_copy, aten.copy_}
# Python's ways to make a tensor of what the host has: on a GPU a copy from the host.
MADE_OF_NUMBERS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
READ, UP, DOWN = "read", "copy to the device", "copy to the host"


class HostWaitError(AssertionError):
    """The host would wait for the device, or copy to it, or mix what lies on both."""


class Remote(Tensor):
    """A tensor on the device that is not here; `numbers` is where its values are."""

    numbers: Tensor
    is_meta = False  # type: ignore[assignment]  # plans ask for it, and for no numbers then
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: Tensor) -> Remote:
        like: dict[str, Any] = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, numbers.size(), dtype=numbers.dtype, device="meta", **like)
        made.numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            made: Tensor = Remote(self.numbers.clone())
            if isinstance(self, nn.Parameter):
                made = nn.Parameter(made, requires_grad=self.requires_grad)
            memo[id(self)] = made.requires_grad_(self.requires_grad)
        found: Tensor = memo[id(self)]
        return found

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Remote({list(self.shape)}, {self.dtype})"


def _is_there(tensor: Tensor) -> bool:
    return isinstance(tensor, Remote) or tensor.is_meta


def _tensors(values: Any, found: list[Tensor]) -> list[Tensor]:
    """Collect the tensors of arguments, nested or not."""
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            _tensors(value, found)
    return found


def _inner(value: Any) -> Any:
    if isinstance(value, Remote):
        return value.numbers
    if isinstance(value, Tensor) and value._is_zerotensor():
        return torch.zeros(value.shape, dtype=value.dtype)
    return type(value)(map(_inner, value)) if isinstance(value, list | tuple) else value


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the numbers; what it gives lies on the device, unless it was asked to be brought here."""
    inner_kwargs = {name: _inner(value) for name, value in kwargs.items()}
    device = kwargs.get("device")
    if device is not None:
        inner_kwargs["device"] = "cpu"
    found = func(*map(_inner, args), **inner_kwargs)
    if device is not None and torch.device(device).type != "meta":
        return found
    if func.overloadpacket is aten.copy_ and not isinstance(args[0], Remote):
        return args[0]
    outer = {id(t.numbers): t for t in _tensors((*args, *kwargs.values()), []) if isinstance(t, Remote)}

    def placed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return outer[id(value)] if id(value) in outer else Remote(value)
        return type(value)(map(placed, value)) if isinstance(value, list | tuple) else value

    return placed(found)


class FakeDevice(TorchDispatchMode):
    """Inside it the meta device has numbers, and `waits` lists what the host does with them: (what, operation, where).

    Tensors of both devices in one operation are refused (single numbers of the host travel by themselves). Without
    `numbers` it is the meta device as it is, for what is too large or must be traced.
    """

    def __init__(self, *, numbers: bool = True) -> None:
        super().__init__()
        self.numbers = numbers
        self.waits: list[tuple[str, str, str]] = []
        self.operations = 0
        self.refusing = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self._stack.enter_context(_MakesOfNumbers(self))
        super().__enter__()
        return self

    def __exit__(self, *failed: Any) -> None:
        super().__exit__(*failed)
        self._stack.close()

    @contextmanager
    def watched(self) -> Iterator[Self]:
        """Refuse every wait in the block."""
        before, self.refusing = self.refusing, True
        try:
            yield self
        finally:
            self.refusing = before

    def counted(self) -> Counter[str]:
        """How many waits of each kind there were."""
        return Counter(what for what, _, _ in self.waits)

    def wait(self, what: str, operation: Any) -> None:
        """Write a wait down, or refuse it."""
        where = _where()
        if self.refusing:
            raise HostWaitError(f"{what} in {operation}, at {where}")
        self.waits.append((what, str(operation), where))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((*args, *kwargs.values()), [])
        there, packet = [t for t in tensors if _is_there(t)], getattr(func, "overloadpacket", func)
        to = kwargs.get("device")
        if (to is None and not there) or packet is aten._efficientzerotensor:  # what stands for no derivative
            return func(*args, **kwargs)
        self.operations += 1
        self._judge(func, packet, args, tensors, there, None if to is None else torch.device(to).type == "meta")
        numbered = [isinstance(t, Remote) or t._is_zerotensor() for t in there]
        if any(numbered) and not all(numbered):
            raise HostWaitError(f"{func}: a list of the host, {UP} that torch makes of it, at {_where()}")
        if any(numbered) or (self.numbers and not there and torch.device(to).type == "meta"):
            return _compute(func, args, kwargs)
        return func(*args, **kwargs)

    def _judge(self, func: Any, packet: Any, args: Any, tensors: list[Tensor], there: list[Tensor], to: Any) -> None:
        here = [t for t in tensors if not _is_there(t)]
        if packet in COPIES:
            target = _is_there(args[0]) if packet is aten.copy_ else to
            source = args[1 if packet is aten.copy_ else 0]
            if target is not None and target != _is_there(source):
                self.wait(UP if target else DOWN, func)
            return
        if there and (packet in READS or (packet in INDEXED and _masked(args[1]))):
            self.wait(READ, func)
        if there and any(t.dim() for t in here):
            if packet not in INDEXED or not _is_there(args[0]):
                raise HostWaitError(f"{func}: tensors of the host and of the device meet")
            self.wait(UP, func)  # numbers of places, which torch sends there


class _MakesOfNumbers(TorchFunctionMode):
    """Sees what Python makes of numbers on the device, which torch does below what `FakeDevice` sees."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if type(func) is type(_SET_DATA) and func == _SET_DATA and isinstance(args[0], Remote):
            args[0].numbers = args[1].numbers  # what a module does to its weights, to give them another type
        if func is Tensor.tolist and isinstance(args[0], Remote):
            self.device.wait(READ, "tolist")
            return args[0].numbers.tolist()
        if func not in MADE_OF_NUMBERS or isinstance(args[func is Tensor.new_tensor], Tensor):
            return func(*args, **kwargs)
        of = args[0] if func is Tensor.new_tensor else None
        to = kwargs.pop("device", None) or (torch.get_default_device() if of is None else of.device)
        if of is not None:
            func, args, kwargs = torch.tensor, args[1:], {"dtype": of.dtype} | kwargs
        made = func(*args, **kwargs, device="cpu")
        return made.to(to) if torch.device(to).type == "meta" else func(*args, **kwargs, device=to)


def _where() -> str:
    """The innermost line of msdcli that is at work."""
    frame = inspect.currentframe()
    while frame is not None:
        _, package, path = frame.f_code.co_filename.rpartition("msdcli")
        if package:
            return f"{package}{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "nowhere in msdcli"


def _masked(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)
