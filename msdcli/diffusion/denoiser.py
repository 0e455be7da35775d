"""Sigma space: every network answers D(x, sigma, condition) with x = y + sigma n (EDM, arXiv 2206.00364)."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence


SIGMA_MIN = 0.002  # EDM's lowest noise level


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Reshape `values` [batch] to broadcast over the images of `like` [batch, ...]."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def image_mean(values: Tensor) -> Tensor:
    """Average `values` [batch, ...] over everything but the batch: one number per image."""
    return values.flatten(1).mean(1)


def distance(error: Tensor, kind: Literal["l2", "huber"]) -> Tensor:
    """Return one number per image of `error` [batch, ...]: the mean square, or a pseudo-Huber distance.

    That is (sqrt(|e|^2 + c^2) - c) / d of images of d numbers, c = 0.00054 d (2-RF++, arXiv 2405.20320).
    """
    if kind == "l2":
        return image_mean(error.square())
    size = error[0].numel()
    return pseudo_huber(error, 0.00054 * size) / size


def pseudo_huber(error: Tensor, c: float) -> Tensor:
    """Return sqrt(|e|^2 + c^2) - c of each image of `error` [batch, ...]; with c = 0 the norm |e|."""
    if c == 0:
        return error.flatten(1).norm(dim=1)  # the derivative of the root is infinite at 0, that of the norm is not
    return (error.square().flatten(1).sum(1) + c**2).sqrt() - c


class Denoiser(nn.Module):
    """D(x, sigma, condition): a raw network F inside EDM's preconditioning (Eq. 7 and Table 1).

    `net(c_in * x, c_noise, condition)` is the raw network. `x` [batch, *shape] float32, `sigma` [batch] float32,
    `condition` [batch] int64 class numbers, or None for an unconditional network. The preconditioning is float32
    whatever the network computes in (`compute_in`). Subclasses for other parametrisations override `forward` and
    `features`. `settings` is the network section it was built from; model.json stores it. Where `reads_text`,
    conditions are numbers of prompts in the store `prompts`, which it must be given before it is called.
    """

    settings: Any = None
    reads_text = False
    prompts: Any = None
    read_from: str | None = None  # the hash of the file that its first weights were read from
    anchor = 0.0  # the noise level at which a consistency model gives back what it is given (`consistency`)

    def __init__(self, net: nn.Module, *, shape: tuple[int, ...], num_classes: int, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.net = net
        self.shape = tuple(shape)
        self.num_classes = num_classes
        self.sigma_data = sigma_data

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        sigma = sigma.to(torch.float32)
        sigma_ = per_image(sigma, x)
        variance = sigma_.square() + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma_ * self.sigma_data / variance.sqrt()
        c_in = 1 / variance.sqrt()
        F_x = self.net(c_in * x, sigma.log() / 4, condition)
        return c_skip * x + c_out * F_x.to(torch.float32)

    def compute_in(self, dtype: torch.dtype | None) -> Self:
        """Let the raw network compute in `dtype`, whatever its weights are held in; None: in the weights' own type."""
        self.net.compute = dtype  # type: ignore[assignment]
        return self

    @property
    def taps(self) -> list[str]:
        """The names of the encoder's blocks, in order, whose features can be asked for."""
        names: list[str] = list(self.net.taps)  # type: ignore[arg-type]  # of a raw network that has them
        return names

    def features(self, x: Tensor, sigma: Tensor, condition: Tensor | None, taps: Sequence[str]) -> list[Tensor]:
        """Return the encoder's features at the named `taps`, without running the decoder."""
        sigma = sigma.to(torch.float32)
        c_in = 1 / (per_image(sigma, x).square() + self.sigma_data**2).sqrt()
        features: list[Tensor] = self.net(c_in * x, sigma.log() / 4, condition, tuple(taps))
        return features


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """EDM's loss weight lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (Table 1)."""
    return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()


def lognormal(normal: Tensor, P_mean: float, P_std: float) -> Tensor:
    """Turn unit normal numbers into EDM's training noise levels: ln(sigma) ~ N(P_mean, P_std^2)."""
    return (normal * P_std + P_mean).exp()


def truncated_lognormal(u: Tensor, P_mean: float, P_std: float, span: Sequence[float]) -> Tensor:
    """Map uniform numbers `u` in [0, 1) to noise levels: ln(sigma) ~ N(P_mean, P_std^2), cut to sigma in `span`."""
    ends = torch.tensor([(math.log(end) - P_mean) / P_std for end in span], dtype=torch.float64)
    low, high = torch.special.ndtr(ends).tolist()  # of the host: single numbers travel by themselves
    return (P_mean + P_std * torch.special.ndtri(low + u.double() * (high - low))).exp().to(u.dtype).clamp(*span)


def karras_sigmas(num: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Return `num` noise levels from `sigma_max` down to `sigma_min` (Eq. 5), float64."""
    ramp = torch.linspace(0, 1, num, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


def ascending_sigmas(num: int, *, like: Tensor, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """Return the schedule in ascending order, in the type and on the device of `like`, where it is made once."""
    return _ascending_sigmas(num, sigma_min, sigma_max, like.device, like.dtype)


@lru_cache(maxsize=64)
def _ascending_sigmas(num: int, sigma_min: float, sigma_max: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    return karras_sigmas(num, sigma_min=sigma_min, sigma_max=sigma_max).flip(0).to(device, dtype)


@lru_cache(maxsize=64)
def whole_numbers(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Return int64 `values` on a device, to which they are copied once."""
    return torch.tensor(values, dtype=torch.int64, device=device)


def karras_draw(u: Tensor, span: Sequence[float], *, num: int = 1000) -> Tensor:
    """Map uniform numbers `u` in [0, 1) to entries of the ascending `num`-step Karras schedule.

    `span` is the part of the schedule that is drawn from, as fractions of its length, without its end: [0.02, 0.981]
    gives the numbers 20 to 980, which are DMD2's.
    """
    schedule = ascending_sigmas(num, like=u)
    low, high = round(span[0] * num), max(round(span[1] * num), round(span[0] * num) + 1)
    index = (low + u * (high - low)).long().clamp(max=min(high, num) - 1)
    return schedule[index]


def continuous_karras(u: Tensor, span: Sequence[float], *, sigma_max: float = 80.0) -> Tensor:
    """Map uniform numbers `u` in [0, 1) to noise levels of the Karras schedule without its steps, ascending.

    `span` is the part of the schedule that is drawn from: [0, 0.8] is SiD's, up to sigma 24.4.
    """
    place = span[0] + u * (span[1] - span[0])
    low, high = 0.002 ** (1 / 7), sigma_max ** (1 / 7)
    return (low + place * (high - low)) ** 7


def one_step(net: nn.Module, z: Tensor, sigma_init: float, condition: Tensor | None) -> Tensor:
    """The generator G(z, c) = D(sigma_init z, sigma_init, c), of an anchored network f(...): one evaluation."""
    return denoise(net, sigma_init * z, sigma_init, condition)


def consistency(net: nn.Module, x: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor:
    """The consistency function f(x, sigma, c), which is x itself at the network's `anchor` sigma_min.

    f = c_skip' x + c_out' F with c_skip' = sd^2 / ((sigma - sigma_min)^2 + sd^2), c_out' = (sigma - sigma_min) sd /
    sqrt(sigma^2 + sd^2) (Song et al. 2023, arXiv 2303.01469, Appendix C), for the F of EDM's D. Anchored at 0 it is D.
    """
    D: Tensor = net(x, sigma, condition)
    anchor = float(getattr(net, "anchor", 0.0))
    if not anchor:
        return D
    assert isinstance(net, Denoiser)
    s, variance = per_image(sigma, x), net.sigma_data**2
    share = 1 - anchor / s  # c_out' / c_out
    return (variance / ((s - anchor).square() + variance) - share * variance / (s.square() + variance)) * x + share * D


def denoise(net: nn.Module, x: Tensor, sigma: float, condition: Tensor | None) -> Tensor:
    """D(x, sigma, c) of images that all have one noise level."""
    level = torch.full((x.shape[0],), sigma, device=x.device)  # not len(x): an export keeps the batch open
    return consistency(net, x, level, condition)


def few_step(
    net: nn.Module, z: Tensor, sigmas: Sequence[float], condition: Tensor | None, noise: Tensor | None = None
) -> Tensor:
    """The generator of several evaluations (DMD2, arXiv 2405.14867, Section 4.4), from unit noise z [batch, *shape]:

        x_0 = sigma_0 z,  y_i = D(x_i, sigma_i, c),  x_{i+1} = y_i + sigma_{i+1} n_i;  the last y is the sample.

    `noise` [batch, len(sigmas) - 1, *shape] holds the n_i; one level needs none, and is `one_step`.
    """
    y = one_step(net, z, sigmas[0], condition)
    for i, sigma in enumerate(sigmas[1:]):
        assert noise is not None, "a student of several levels needs noise between them"
        y = denoise(net, y + sigma * noise[:, i], sigma, condition)
    return y


def matching_gradient(D_fake: Tensor, D_teacher: Tensor, y: Tensor) -> Tensor:
    """Distribution matching's gradient with respect to the image y (DMD, arXiv 2311.18828, Eq. 7 and 8).

    In denoiser form g = (D_fake - D_teacher) / w, with w = mean |y - D_teacher| of each image.
    """
    return (D_fake - D_teacher) / per_image(distance_to_teacher(y, D_teacher), y)


def distance_to_teacher(y: Tensor, D_teacher: Tensor) -> Tensor:
    """w = mean |y - D_teacher| of each image [batch], without gradient, and at least 1e-5."""
    return image_mean((y - D_teacher).abs()).detach().clamp(min=1e-5)


def surrogate(y: Tensor, gradient: Tensor) -> Tensor:
    """One loss per image whose derivative with respect to y is `gradient` / (numbers in an image)."""
    return 0.5 * image_mean((y - (y - gradient).detach()).square())
