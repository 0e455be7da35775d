"""Networks that do not fit into one device: FSDP2, in place, so that objectives call them as ever."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from msdcli.nets.unet_taps import TappedUNet

if TYPE_CHECKING:
    from msdcli.engine.distributed import Group


def shard(net: nn.Module, group: Group) -> None:
    """Leave to every process its part of the weights; a block's are put together while the block computes.

    Parameters of a single number stay whole: their gradients are averaged like those of a network that is not sharded.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # slow to import, and seldom needed

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nobody changes it in place
    mesh = _mesh("cuda" if torch.cuda.is_available() else "cpu", group.size)
    single = {param for param in net.parameters() if param.ndim == 0}
    for param in single:
        param.data = param.data.to(_device(mesh))
    for unit in [*_units(net), net]:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=single)
    if hasattr(net, "features"):
        register_fsdp_forward_method(net, "features")


def _units(net: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of a network: what its lists and dictionaries of modules hold.

    And what it has beside them, where the weights are settled before a call (EDM2): that must see every process' part.
    """
    for child in net.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            for block in child.children():
                if isinstance(block, nn.ModuleList | nn.ModuleDict):
                    yield from _units(block)
                elif any(param.ndim for param in block.parameters()):
                    yield block
        else:
            yield from _units(child)
            if isinstance(child, TappedUNet):
                yield child


@lru_cache
def _mesh(device_type: str, size: int) -> Any:
    """Return all processes in a row; all must ask for it."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type, (size,))


def _device(mesh: Any) -> torch.device:
    return torch.device(mesh.device_type, torch.cuda.current_device() if mesh.device_type == "cuda" else None)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor; a second to import, and most runs need none."""
    return hasattr(tensor, "to_local")


def own_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor that may be sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be sharded; then all processes must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def whole_state(net: nn.Module, group: Group) -> dict[str, Tensor]:
    """Return a network's tensors to the leader, on the host where they are sharded; nobody else keeps more than one of
    them at a time. All processes must ask.
    """
    found = {}
    for name, tensor in net.state_dict().items():
        complete = whole(tensor)
        if group.leads:
            found[name] = complete.cpu() if is_sharded(tensor) else tensor
    return found


def on_host(tensor: Tensor) -> Tensor:
    """Return a copy in host memory, of this process' part only where the tensor is sharded; then all must ask."""
    copied = own_part(tensor.detach()).to("cpu", copy=True)
    if not is_sharded(tensor):
        return copied
    from torch.distributed.tensor import DTensor

    mesh = _mesh("cpu", tensor.device_mesh.size())
    layout = {"shape": tensor.shape, "stride": tensor.stride(), "run_check": False}
    return DTensor.from_local(copied, mesh, tensor.placements, **layout)


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
