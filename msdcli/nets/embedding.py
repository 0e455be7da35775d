"""The embedding of noise level and class that conditions every block."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msdcli.errors import UserError

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def zeroed(layer: Layer) -> Layer:
    """Set a layer's weights to zero, so that the branch it ends starts as nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def tap_number(taps: list[str], tap: str) -> int:
    """Return the position of a named block. UserError if there is none of that name."""
    if tap not in taps:
        raise UserError(f"no encoder block is called {tap!r}; there are {', '.join(taps)}")
    return taps.index(tap)


class Embedding(nn.Module):
    """Fourier features of c_noise through two layers, plus one learned vector per class: [batch, width]."""

    frequencies: Tensor

    def __init__(self, width: int, num_classes: int, *, num_frequencies: int = 16) -> None:
        super().__init__()
        self.width = width
        # c_noise = ln(sigma) / 4 spans about [-1.6, 1.1]: octaves from half a turn to fine detail.
        # Computed on the CPU: on the meta device torch would import its compiler for it, which takes a second.
        octaves = torch.logspace(-2, 2, num_frequencies, base=2.0, device="cpu")
        frequencies = (2 * math.pi * octaves).to(torch.get_default_device())
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.noise0 = nn.Linear(2 * num_frequencies, width)
        self.noise1 = nn.Linear(width, width)
        self.classes = nn.Embedding(num_classes, width) if num_classes else None

    def forward(self, c_noise: Tensor, condition: Tensor | None) -> Tensor:
        angles = c_noise[:, None] * self.frequencies
        e = self.noise1(
            F.silu(self.noise0(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.noise0.weight.dtype)))
        )
        if self.classes is not None:
            assert condition is not None, "a class-conditional network was called without classes"
            # A negative number stands for no class.
            e = e + self.classes(condition.clamp(min=0)) * (condition >= 0)[:, None]
        return F.silu(e)
