"""Distributions whose denoisers are known in closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msdcli.diffusion.denoiser import per_image


class GaussianDenoiser(nn.Module):
    """The exact D(x, sigma) of y ~ N(mean, diag(variance)): E[y | x] for x = y + sigma n. Float64 throughout."""

    def __init__(self, mean: Tensor, variance: Tensor, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.mean = nn.Parameter(mean.double())
        self.variance = variance.double()
        self.sigma_data = sigma_data
        self.shape, self.num_classes = tuple(mean.shape), 1

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        s2 = per_image(sigma, x).square()
        return (self.variance * x + s2 * self.mean) / (self.variance + s2)


WEIGHTS, MEANS, VARIANCES = (torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.7], [-0.6, 0.5], [0.04, 0.09]))


def mixture(x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
    """The exact D(x, sigma) of a mixture of two normal distributions on the line, x [batch, 1], float64."""
    V = VARIANCES + per_image(sigma, x).square()
    share = (WEIGHTS.log() - V.log() / 2 - (x - MEANS).square() / (2 * V)).softmax(1)
    return (share * (MEANS + VARIANCES / V * (x - MEANS))).sum(1, keepdim=True)


class Shift(nn.Module):
    """A one-step generator whose samples are N(mean, variance): y = mean + sqrt(variance) z, where x = sigma z."""

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.mean = nn.Parameter(mean.double())
        self.scale = variance.double().sqrt()
        self.shape, self.num_classes = tuple(mean.shape), 1

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.mean + self.scale * x / per_image(sigma, x)
