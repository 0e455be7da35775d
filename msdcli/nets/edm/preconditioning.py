"""The four preconditionings of EDM's Table 1 (Karras et al. 2022, arXiv 2206.00364) around a U-Net with taps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from msdcli.diffusion.denoiser import Denoiser, per_image
from msdcli.nets.edm.unet_taps import ExactBuffers, TappedUNet

Coefficients = tuple[Tensor | float, Tensor, Tensor | float, Tensor]


class Preconditioned(ExactBuffers, Denoiser):
    """D(x, sigma, condition) = c_skip x + c_out F(c_in x, c_noise, condition) (Eq. 7); here with EDM's coefficients.

    `condition` is [n] int64 class numbers, [n, num_classes] float one-hot rows, or None; None and negative numbers are
    no class, a row of zeros. A network without classes ignores it. `sigma_min` and `sigma_max` bound the noise levels
    that it was made for.
    """

    net: TappedUNet

    def __init__(
        self,
        net: TappedUNet,
        *,
        shape: tuple[int, ...],
        num_classes: int,
        sigma_data: float = 0.5,
        sigma_min: float = 0.0,
        sigma_max: float = math.inf,
    ) -> None:
        super().__init__(net, shape=shape, num_classes=num_classes, sigma_data=sigma_data)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    @property
    def taps(self) -> list[str]:
        """Names that `features` takes."""
        assert isinstance(self.net, TappedUNet)
        return list(self.net.taps)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """c_skip, c_out, c_in and c_noise for `sigma` [n, 1, 1, 1] float32."""
        variance = sigma.square() + self.sigma_data**2
        c_out = sigma * self.sigma_data / variance.sqrt()
        return self.sigma_data**2 / variance, c_out, 1 / variance.sqrt(), sigma.log() / 4

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest noise levels that the network knows."""
        return sigma

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        x = x.to(torch.float32)
        c_skip, c_out, c_in, c_noise = self.coefficients(per_image(sigma.to(torch.float32), x))
        self.net.settle()
        F_x: Tensor = self.net(c_in * x, c_noise.flatten(), self.labels(x, condition))
        # A network that also predicts its variance (iDDPM) has more channels than the image.
        return c_skip * x + c_out * F_x[:, : x.shape[1]].to(torch.float32)

    def features(
        self, x: Tensor, sigma: Tensor, condition: Tensor | None = None, taps: Sequence[str] = ()
    ) -> list[Tensor]:
        """Features of the named encoder blocks, [n, channels, h, w] each; the decoder does not run."""
        x = x.to(torch.float32)
        _, _, c_in, c_noise = self.coefficients(per_image(sigma.to(torch.float32), x))
        self.net.settle()
        features: list[Tensor] = self.net(c_in * x, c_noise.flatten(), self.labels(x, condition), tuple(taps))
        return features

    def labels(self, x: Tensor, condition: Tensor | None) -> Tensor | None:
        """One-hot rows [n, num_classes] float32 for the images `x`, or None where there are no classes."""
        if not self.num_classes:
            return None
        rows = x.new_zeros(x.shape[0], self.num_classes)
        if condition is None:
            return rows
        if condition.is_floating_point():
            assert condition.shape == rows.shape, f"one-hot rows {list(condition.shape)}, not {list(rows.shape)}"
            return condition.to(torch.float32)
        numbers = condition.reshape(-1, 1).expand(x.shape[0], 1)
        return rows.scatter(1, numbers.clamp(min=0), (numbers >= 0).to(rows.dtype))


class VP(Preconditioned):
    """Variance preserving, sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1, with `M` discrete steps."""

    def __init__(
        self,
        net: TappedUNet,
        *,
        shape: tuple[int, ...],
        num_classes: int,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        M: int = 1000,
        epsilon_t: float = 1e-5,
    ) -> None:
        super().__init__(net, shape=shape, num_classes=num_classes)
        self.beta_d, self.beta_min, self.M = beta_d, beta_min, M
        self.sigma_min, self.sigma_max = self.sigma_of(epsilon_t), self.sigma_of(1.0)

    def sigma_of(self, t: float) -> float:
        return math.sqrt(math.expm1(0.5 * self.beta_d * t**2 + self.beta_min * t))

    def coefficients(self, sigma: Tensor) -> Coefficients:
        # Not log1p: the original's float32 rounding of t at small sigma is part of the published networks.
        t = ((self.beta_min**2 + 2 * self.beta_d * (1 + sigma.square()).log()).sqrt() - self.beta_min) / self.beta_d
        return 1.0, -sigma, 1 / (sigma.square() + 1).sqrt(), (self.M - 1) * t


class VE(Preconditioned):
    """Variance exploding, as NCSN++ was trained by Song et al."""

    def __init__(
        self,
        net: TappedUNet,
        *,
        shape: tuple[int, ...],
        num_classes: int,
        sigma_min: float = 0.02,
        sigma_max: float = 100.0,
    ) -> None:
        super().__init__(net, shape=shape, num_classes=num_classes, sigma_min=sigma_min, sigma_max=sigma_max)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        return 1.0, sigma, 1.0, (0.5 * sigma).log()


class IDDPM(Preconditioned):
    """Improved DDPM (Nichol and Dhariwal 2021, arXiv 2102.09672): `M` discrete noise levels `u`, the largest first.

    Its network has twice the image's channels; the second half, the variance, is not used.
    """

    u: Tensor

    def __init__(
        self,
        net: TappedUNet,
        *,
        shape: tuple[int, ...],
        num_classes: int,
        C_1: float = 0.001,
        C_2: float = 0.008,
        M: int = 1000,
    ) -> None:
        super().__init__(net, shape=shape, num_classes=num_classes)
        self.M = M
        u = iddpm_levels(M, C_1, C_2)
        self.register_buffer("u", torch.tensor(u, dtype=torch.float32))
        self.sigma_min, self.sigma_max = u[M - 1], u[0]

    def nearest(self, sigma: Tensor) -> Tensor:
        """Index into `u` of the level nearest to each sigma, in sigma's shape."""
        return (sigma.to(torch.float32).unsqueeze(-1) - self.u).abs().argmin(-1)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return self.u[self.nearest(sigma)].to(sigma.dtype)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        c_noise = self.M - 1 - self.nearest(sigma).to(torch.float32)
        return 1.0, -sigma, 1 / (sigma.square() + 1).sqrt(), c_noise


def iddpm_levels(M: int, C_1: float, C_2: float) -> list[float]:
    """The noise levels u_0 > ... > u_M = 0 of EDM's Table 1, in float64."""
    alpha_bar = [math.sin(0.5 * math.pi * j / M / (C_2 + 1)) ** 2 for j in range(M + 1)]
    u = [0.0] * (M + 1)
    for j in range(M, 0, -1):
        u[j - 1] = math.sqrt((u[j] ** 2 + 1) / max(alpha_bar[j - 1] / alpha_bar[j], C_1) - 1)
    return u
