"""Deterministic samplers of the teacher (Karras et al. 2022, arXiv 2206.00364)."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msdcli.diffusion.denoiser import karras_sigmas

if TYPE_CHECKING:
    from collections.abc import Callable


@torch.no_grad()
def heun(
    denoise: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    z: Tensor,
    condition: Tensor | None,
    *,
    steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Tensor:
    """Solve the probability-flow ODE from unit noise `z` [batch, ...] by Heun's method (Algorithm 1).

    It takes 2 steps - 1 calls. The state is float64; the network sees `z`'s own type.
    """
    sigmas = karras_sigmas(steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho).to(z.device)
    sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])

    def slope(x: Tensor, sigma: Tensor) -> Tensor:
        denoised = denoise(x.to(z.dtype), sigma.to(z.dtype).expand(len(x)), condition)
        return (x - denoised.to(torch.float64)) / sigma

    x = z.to(torch.float64) * sigmas[0]
    for sigma, sigma_next in itertools.pairwise(sigmas):
        d = slope(x, sigma)
        x_next = x + (sigma_next - sigma) * d
        if sigma_next > 0:  # the last step is Euler's: there is no slope at sigma = 0
            x_next = x + (sigma_next - sigma) * 0.5 * (d + slope(x_next, sigma_next))
        x = x_next
    return x.to(z.dtype)
