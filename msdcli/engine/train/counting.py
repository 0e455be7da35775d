"""Parameters, operations and kept bytes of networks, counted without memory or time: on the meta device, or, of small
ones, on the CPU.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from msdcli import nets
from msdcli.diffusion import guidance
from msdcli.diffusion.denoiser import Denoiser
from msdcli.diffusion.draws import Draws
from msdcli.diffusion.guidance import drawn
from msdcli.nets.adapters import AdaptedDenoiser
from msdcli.nets.meta import on_meta
from msdcli.objectives import Objective
from msdcli.recipe.networks import MLPSettings, UNetSettings

# What a device multiplies where none is at hand to be measured: a third of what an A100 does in TF32, as convolutions
# of U-Nets reach.
DEVICE, PEAK_FLOPS, UTILISATION = "A100, TF32", 156e12, 0.3


class _Eager(TorchDispatchMode):
    """A mode that torch does not wrap for its compiler, which it would import for that: a second of every process."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """What torch asks before it wraps `__torch_dispatch__`."""
        return False


class FlopCounter(_Eager):
    """Counts the floating-point operations of a block in `total`: those of torch's FlopCounterMode, by its formulas.

    That one also tells modules apart, and makes torch import its compiler, which takes a second of every process.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        from torch.utils.flop_counter import flop_registry  # slow to import

        self._formulas: dict[Any, Callable[..., int]] = flop_registry
        self.total: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = self._formulas.get(getattr(func, "_overloadpacket", func))
        if formula is None and hasattr(func, "decompose") and func is not torch.ops.prim.device.default:
            with self:  # what is made of others is counted by them
                if (made := _decomposed(func, args, kwargs)) is not NotImplemented:
                    return made
        result = func(*args, **kwargs)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=result))
        return result


def _decomposed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what an operation that is made of others gives, made of them; NotImplemented for one that is not.

    `decompose` alone prefers rules in Python, also for operations with a kernel of their own (those that resize
    images), and they import SymPy: half a second of every process.
    """
    composite, has_kernel = (
        torch._C.DispatchKey.CompositeImplicitAutograd,
        torch._C._dispatch_has_kernel_for_dispatch_key,
    )
    if has_kernel(func.name(), composite):
        return func._op_dk(composite, *args, **kwargs)
    return NotImplemented if has_kernel(func.name(), "CPU") else func.decompose(*args, **kwargs)


class KernelCounter(_Eager):
    """Counts, in `total`, the operations of a block that a GPU has a kernel launched for: all but views and memory."""

    NONE = ("empty", "detach", "_unsafe_view", "_reshape_alias", "_assert", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__.split(".")[0]
        self.total += not (func.is_view or name.startswith(self.NONE))
        return func(*args, **(kwargs or {}))


class MemoryCounter(_Eager):
    """Follows the bytes of all tensors that a block makes, as a device would hold them: `now`, and at most (`peak`).

    What was there before, weights above all, is not counted; nor are an allocator's gaps and libraries' workspaces.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {storage._cdata for storage in _storages(args)}  # of what is changed in place, or seen in another way
        for storage in _storages(result):
            if storage._cdata not in before:
                self.hold(storage)
        return result

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def freed(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    if isinstance(values, Tensor):
        yield values.untyped_storage()
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _storages(value)


class MetaDraws(Draws):
    """Draws of the right shapes and of no numbers: those of one of `passes` equal passes over a batch."""

    def __init__(self, shape: tuple[int, ...], batch: int, passes: int = 1, device: str = "meta") -> None:
        self.shape, self.batch, self.part, self.device = shape, batch // passes, (0, passes), device
        self.step = 0

    def of_step(self) -> Draws:
        return self

    def normal(self, purpose: str, shape: tuple[int, ...] | None = None) -> Tensor:
        return self.numbers(self.batch, self.shape if shape is None else shape)

    def uniform(self, purpose: str) -> Tensor:
        return torch.zeros(self.batch, device=self.device)

    def real(self) -> tuple[Tensor, Tensor]:
        return self.normal("real"), self.labels("data")

    def labels(self, how: str, count: int | None = None) -> Tensor:
        return torch.zeros(count or self.batch, dtype=torch.int64, device=self.device)

    def one_of(self, purpose: str, count: int) -> int:
        return self.step % count

    def pairs(self, only_part: bool, count: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        count = count // self.part[1] if count else self.batch
        z = self.numbers(count, self.shape)
        return z, z.clone(), self.labels("data", count)

    def numbers(self, count: int, shape: tuple[int, ...]) -> Tensor:
        """Return what stands for unit normal numbers [count, *shape]."""
        return torch.zeros(count, *shape, device=self.device)


# Weights times positions times images of a batch that a CPU counts at once: about half a second of it.
COUNTED_ON_CPU = 10**9


def for_counting(net: Denoiser, batch: int) -> Denoiser:
    """Return a network that was built on the meta device, or its like on the CPU where a step of it takes no time.

    On the meta device torch works out many shapes in Python, for which it imports its compiler: two seconds of every
    process. What is counted is the same.
    """
    own = isinstance(net.settings, UNetSettings | MLPSettings) and not isinstance(net, AdaptedDenoiser)
    if not own or num_parameters(net) * math.prod(net.shape[1:]) * batch > COUNTED_ON_CPU:
        return net
    return with_memory(net)


def with_memory(net: Denoiser) -> Denoiser:
    """Return a network like one on the meta device on the CPU, of zeros."""
    copied = guidance.copied(net)  # with its guidance, which costs a branch
    whole = copied.twin if isinstance(copied, AdaptedDenoiser) else copied  # its base is none of its parameters
    for module in whole.modules():  # `to_empty` goes the slow way, too
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.zeros(weight.shape), weight.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    if whole is not copied:
        copied.to("cpu")  # takes hold of its new adapters
    return copied


def turn_bytes(
    objective: Objective, names: tuple[str, ...], loss: Callable[[Draws], Tensor], draws: Draws, *, passes: int
) -> int:
    """Return the most bytes that a pass of a turn takes at once: samples, activations and gradients, those of the
    passes before it among them.
    """
    with MemoryCounter() as memory:
        for name, net in objective.nets.items():
            net.requires_grad_(name in names)
            for param in net.parameters() if name in names and passes > 1 else ():
                param.grad = torch.empty_like(param)
        loss(draws).mean().backward()
    for net in objective.nets.values():
        net.zero_grad()
    peak: int = memory.peak
    return peak


def forward_flops(net: Denoiser) -> int:
    """Operations of one evaluation of one image."""
    return _forward(net, FlopCounter()).total


def evaluation_cost(net: Denoiser) -> tuple[int, int]:
    """Return the kernels of one evaluation, and its operations for one image, of a network like this one on the meta
    device.
    """
    with on_meta():
        alike = nets.build_like(net.settings, net)
        return _forward(alike, KernelCounter()).total, forward_flops(alike)


Counter = TypeVar("Counter", FlopCounter, KernelCounter)


@torch.no_grad()
def _forward(net: Denoiser, counter: Counter) -> Counter:
    draws = MetaDraws(net.shape, 1, device=next(net.parameters()).device.type)
    with counter:
        drawn(net, draws.uniform)(draws.normal("x"), draws.uniform("sigma"), draws.labels("data"))
    return counter


def num_parameters(net: nn.Module) -> int:
    """Parameters of a network."""
    return sum(parameter.numel() for parameter in net.parameters())
