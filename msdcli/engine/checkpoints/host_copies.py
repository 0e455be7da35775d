"""Copies of training state in host memory, for which the host waits as little as the device allows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from msdcli.engine.distributed.sharded_tensors import on_host, own_part
from msdcli.errors import is_out_of_memory

CHUNK = 2**28  # bytes of pinned memory that are asked for at once: torch rounds each request up to a power of two
ALIGNED = 512  # bytes that a tensor's place is a multiple of


@dataclass(frozen=True)
class HostCopy:
    """Named tensors on the host, which may still be on their way there."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    arrived: torch.cuda.Event | None = None  # None: they are there

    def wait(self) -> dict[str, Tensor]:
        """Return the tensors when they are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensors


class HostCopies:
    """Copies the same named tensors time after time, one copy alive at once.

    What lies on a GPU goes to pinned memory, which is kept: the GPU copies it between the step before and the one that
    changes it, and the host goes on. Pageable memory is slower by a multiple, and the host waits; it has to do where no
    memory can be pinned.
    """

    def __init__(self) -> None:
        self._places: dict[str, Tensor] | None = None

    def copy(self, state: Iterable[tuple[str, Any]]) -> HostCopy:
        """Return a copy, of this process' parts where tensors are sharded."""
        named = dict(state)
        there = {name: part for name, tensor in named.items() if _on_gpu(part := own_part(tensor.detach()))}
        if self._places is None or not _fit(self._places, there):
            self._places = None  # given back before others are asked for
            self._places = _pinned_places(there)
        copies = {name: on_host(tensor, partial(self._copied, name)) for name, tensor in named.items()}
        if not self._places:
            return HostCopy(copies)
        arrived = torch.cuda.Event(blocking=True)
        arrived.record(torch.cuda.current_stream(next(iter(there.values())).device))
        return HostCopy(copies, arrived)

    def _copied(self, name: str, part: Tensor) -> Tensor:
        place = (self._places or {}).get(name)
        return part.to("cpu", copy=True) if place is None else place.copy_(part, non_blocking=True)


def _on_gpu(part: Tensor) -> bool:
    return part.is_cuda


def _fit(places: dict[str, Tensor], there: dict[str, Tensor]) -> bool:
    """Whether these are places of these tensors, or none because no memory could be pinned."""
    return not places or (
        places.keys() == there.keys()
        and all((p.shape, p.dtype) == (there[n].shape, there[n].dtype) for n, p in places.items())
    )


def _pinned_places(there: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a place in pinned memory for each tensor, laid out as it is; none for any where memory is too small."""
    left = sum(_size(part) for part in there.values())
    places, chunk = dict[str, Tensor](), torch.empty(0, dtype=torch.uint8)
    try:
        for name, part in there.items():
            size = _size(part)
            if size > len(chunk):
                chunk = _pinned(max(size, min(CHUNK, left)))
            strides = torch.empty_like(part, device="meta").stride()  # of what has no gaps
            places[name] = chunk[: part.nbytes].view(part.dtype).as_strided(part.shape, strides)
            chunk, left = chunk[size:], left - size
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {}
    return places


def _size(part: Tensor) -> int:
    return -(-part.nbytes // ALIGNED) * ALIGNED


def _pinned(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, pin_memory=True)
