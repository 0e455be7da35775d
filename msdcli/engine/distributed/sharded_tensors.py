"""Tensors of which every process may hold a part only: torch's DTensors, or plain ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn


@lru_cache
def row_of_processes(device_type: str, size: int) -> Any:
    """Return all processes in a row; all must ask for it."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type, (size,))


def is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor; a second to import, and most runs need none."""
    return hasattr(tensor, "to_local")


def own_part(tensor: Any) -> Tensor:
    """Return what this process holds of a tensor that may be sharded."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part


def whole(tensor: Any) -> Tensor:
    """Return all of a tensor that may be sharded; then all processes must ask for it."""
    complete: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return complete


def on_host(tensor: Any, copy: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a copy in host memory, which `copy` makes of this process' part; all must ask where it is sharded."""
    copied = copy(own_part(tensor.detach()))
    if not is_sharded(tensor):
        return copied
    from torch.distributed.tensor import DTensor

    mesh = row_of_processes("cpu", tensor.device_mesh.size())
    return DTensor.from_local(
        copied, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def split(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return those that are sharded and those that are not, each if there are any: torch's kernels take no mixture."""
    found: dict[bool, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(is_sharded(tensor), []).append(tensor)
    return list(found.values())


def norm_of(tensors: Iterable[Tensor]) -> Tensor:
    """Return the norm of tensors of which some may be sharded, everywhere the same."""
    norms = [whole(nn.utils.get_total_norm(some)) for some in split(tensors)]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
