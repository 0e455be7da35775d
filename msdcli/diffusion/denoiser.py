"""Sigma space: every network answers D(x, sigma, condition) with x = y + sigma * n (Karras et al. 2022, arXiv 2206.00364)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Reshape `values` [batch] to broadcast over the images of `like` [batch, ...]."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


class Denoiser(nn.Module):
    """D(x, sigma, condition): a raw network F inside EDM's preconditioning (Eq. 7 and Table 1).

    `net(c_in * x, c_noise, condition)` is the raw network. `x` [batch, *shape] float32, `sigma` [batch] float32,
    `condition` [batch] int64 class numbers, or None for an unconditional network. The preconditioning is float32
    whatever the network computes in. Subclasses for other parametrisations override `forward` alone.
    """

    def __init__(self, net: nn.Module, *, shape: tuple[int, ...], num_classes: int, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.net = net
        self.shape = tuple(shape)
        self.num_classes = num_classes
        self.sigma_data = sigma_data

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        sigma = per_image(sigma.to(torch.float32), x)
        variance = sigma.square() + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data / variance.sqrt()
        c_in = 1 / variance.sqrt()
        c_noise = sigma.log() / 4
        F_x = self.net(c_in * x, c_noise.flatten(), condition)
        return c_skip * x + c_out * F_x.to(torch.float32)
