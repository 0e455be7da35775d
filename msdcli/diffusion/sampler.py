"""Deterministic samplers of the teacher: its probability-flow ODE, solved in sigma space from unit noise."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msdcli.diffusion.denoiser import karras_sigmas

if TYPE_CHECKING:
    from collections.abc import Callable

    Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def solve(
    denoise: Denoise,
    z: Tensor,
    condition: Tensor | None,
    *,
    name: str = "heun",
    steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Tensor:
    """Solve the ODE from unit noise `z` [batch, ...] on Karras' noise levels, by the solver called `name`.

    The state is float64; the network sees `z`'s own type.
    """
    sigmas = karras_sigmas(steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho).to(z.device)
    return SOLVERS[name](denoise, z, condition, sigmas)


@torch.no_grad()
def heun(denoise: Denoise, z: Tensor, condition: Tensor | None, sigmas: Tensor) -> Tensor:
    """Heun's method (Karras et al. 2022, arXiv 2206.00364, Algorithm 1) on descending `sigmas` (float64), then 0.

    It takes 2 len(sigmas) - 1 calls.
    """
    ask = _in_float64(denoise, z, condition)

    def slope(x: Tensor, sigma: Tensor) -> Tensor:
        return (x - ask(x, sigma)) / sigma

    x = z.to(torch.float64) * sigmas[0]
    for sigma, sigma_next in itertools.pairwise([*sigmas, sigmas.new_zeros(())]):
        d = slope(x, sigma)
        x_next = x + (sigma_next - sigma) * d
        if sigma_next > 0:  # the last step is Euler's: there is no slope at sigma = 0
            x_next = x + (sigma_next - sigma) * 0.5 * (d + slope(x_next, sigma_next))
        x = x_next
    return x.to(z.dtype)


@torch.no_grad()
def dpmpp_2m(denoise: Denoise, z: Tensor, condition: Tensor | None, sigmas: Tensor) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, Algorithm 2) on descending `sigmas` (float64), then 0.

    It takes one call per noise level. In sigma space lambda = -ln(sigma); the first step and the last are of first
    order, because the first has no step before it and the last is infinitely long in lambda.
    """
    ask = _in_float64(denoise, z, condition)
    lambdas = -sigmas.log()
    x, previous = z.to(torch.float64) * sigmas[0], None
    for i, sigma in enumerate(sigmas[:-1]):
        denoised, h = ask(x, sigma), lambdas[i + 1] - lambdas[i]
        D = denoised
        if previous is not None:
            r = (lambdas[i] - lambdas[i - 1]) / h
            D = denoised + (denoised - previous) / (2 * r)
        x = sigmas[i + 1] / sigma * x - torch.expm1(-h) * D
        previous = denoised
    return ask(x, sigmas[-1]).to(z.dtype)


def _in_float64(denoise: Denoise, z: Tensor, condition: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
    def ask(x: Tensor, sigma: Tensor) -> Tensor:
        return denoise(x.to(z.dtype), sigma.to(z.dtype).expand(len(x)), condition).to(torch.float64)

    return ask


SOLVERS = {"heun": heun, "dpmpp_2m": dpmpp_2m}


def num_evaluations(name: str, steps: int) -> int:
    """How often a solver calls the network."""
    return 2 * steps - 1 if name == "heun" else steps
