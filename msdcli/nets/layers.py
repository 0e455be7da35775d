"""Layers that compute in the type of their input: float32 weights that learn, in a network that runs in bfloat16.

A weight of another type is cast in every call, with its gradient cast back; of the same type it is used as it is, to
the bit. Networks cast their input once, where they begin (`computing_in`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def like(weight: Tensor | None, x: Tensor) -> Tensor | None:
    """Return `weight` in the type of `x`."""
    return None if weight is None else weight.to(x.dtype)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), like(self.bias, x))


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.to(x.dtype), like(self.bias, x))


class GroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, like(self.weight, x), like(self.bias, x), self.eps)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, like(self.weight, x), like(self.bias, x), self.eps)


def computing_in(net: nn.Module) -> torch.dtype:
    """Return the type that a raw network computes in: its attribute `compute`, else the type of its weights."""
    chosen: torch.dtype | None = getattr(net, "compute", None)
    return next(net.parameters()).dtype if chosen is None else chosen
