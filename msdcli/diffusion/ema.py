"""The moving average of a network's weights that samples are drawn from."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from msdcli.diffusion.denoiser import Denoiser


class EMA:
    """An exponential moving average of `net`, warmed up so that a short run is not held by its start.

    The decay at update t is min(decay, (1 + t) / (10 + t)).
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        self.net = copy.deepcopy(net).requires_grad_(False).eval()

    @property
    def denoiser(self) -> Denoiser:
        """The average, where it is one of a denoiser's."""
        assert isinstance(self.net, Denoiser)
        return self.net

    @torch.no_grad()
    def update(self, net: nn.Module, num_updates: int) -> None:
        """Move towards `net`, after its update number `num_updates` (from 0)."""
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        torch._foreach_lerp_([*map(_own, self.net.parameters())], [*map(_own, net.parameters())], 1 - decay)
        for averages, buffers in _alike(self.net.buffers(), net.buffers()):
            torch._foreach_copy_(averages, buffers)


def _alike(some: Iterable[Tensor], others: Iterable[Tensor]) -> Iterable[tuple[list[Tensor], list[Tensor]]]:
    """Return pairs of tensors in lists of one type and device each, which one kernel copies (counters are integers)."""
    found: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for one, other in zip(some, others, strict=True):
        ones, theirs = found.setdefault((one.dtype, one.device), ([], []))
        ones.append(one)
        theirs.append(other)
    return found.values()


def _own(param: Tensor) -> Tensor:
    """What this process holds of a weight: all of it, or its part where networks are sharded (both alike)."""
    own: Tensor = param.to_local() if hasattr(param, "to_local") else param.detach()
    return own
