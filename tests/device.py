"""A device that is not here: the meta device in its place, where every operation is watched as a GPU would be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# What a GPU is waited for: its values, or a shape that depends on them.
WAITS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.unique_dim, aten._unique2)


class HostWaitError(AssertionError):
    """The host would wait for the device, or copy to it, or mix what lies on both."""


class NoWaiting(TorchDispatchMode):
    """Refuses, of tensors on the meta device, what would stop the host at a GPU: reading values, shapes that depend on
    them, copies from or to the host, and operations on tensors of both (single numbers of the host travel by
    themselves).
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there, here = ([t for t in tensors if t.is_meta is on_meta] for on_meta in (True, False))
        packet = getattr(func, "overloadpacket", func)
        if there:
            self.operations += 1
            if packet in WAITS or (packet in (aten.index, aten.index_put, aten.index_put_) and _masked(args[1])):
                raise HostWaitError(f"{func}: the host would wait for the device")
            if any(t.dim() for t in here):
                raise HostWaitError(f"{func}: tensors of the host and of the device meet")
        to = kwargs.get("device")
        if (
            packet is aten._to_copy
            and to is not None
            and tensors
            and tensors[0].is_meta != (torch.device(to).type == "meta")
        ):
            raise HostWaitError(f"{func}: a copy between host and device")
        return func(*args, **kwargs)


def _masked(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)
