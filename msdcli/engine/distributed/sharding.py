"""Networks that do not fit into one device: FSDP2, in place, so that objectives call them as ever."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from msdcli.engine.distributed.group import ProcessGroup
from msdcli.engine.distributed.sharded_tensors import is_sharded, row_of_processes, whole
from msdcli.nets.edm.unet_taps import TappedUNet


def shard(net: nn.Module, group: ProcessGroup) -> None:
    """Leave to every process its part of the weights; a block's are put together while the block computes.

    Parameters of a single number stay whole: their gradients are averaged like those of a network that is not sharded.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # slow to import, and seldom needed

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nobody changes it in place
    mesh = row_of_processes("cuda" if torch.cuda.is_available() else "cpu", group.size)
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


def _device(mesh: Any) -> torch.device:
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)


def whole_state(net: nn.Module, group: ProcessGroup) -> dict[str, Tensor]:
    """Return a network's tensors to the leader, on the host where they are sharded; nobody else keeps more than one of
    them at a time. All processes must ask.
    """
    found = {}
    for name, tensor in net.state_dict().items():
        complete = whole(tensor)
        if group.is_leader:
            found[name] = complete.cpu() if is_sharded(tensor) else tensor
    return found
