"""The autoencoder of a latent teacher: diffusers' AutoencoderKL (Rombach et al. 2022, arXiv 2112.10752)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from msdcli.errors import UserError
from msdcli.nets.diffusers.files import import_diffusers

# Pixels that are decoded or encoded at once: the activations of one 512 x 512 picture take about 3 GB.
PIXELS_AT_ONCE = 4 * 512 * 512


@dataclass(frozen=True)
class Geometry:
    """What an autoencoder makes of pictures: `factor` pixels, in each direction, become one position of the latent."""

    image_channels: int
    channels: int
    factor: int

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the latent's shape [c, h, w] for pictures of `shape`. UserError where they do not divide."""
        if len(shape) != 3 or shape[0] != self.image_channels:
            raise UserError(
                f"the teacher's autoencoder takes pictures of {self.image_channels} channels, the data have shape "
                f"{list(shape)}",
                hint=f"data.channels={self.image_channels}",
            )
        if any(side % self.factor for side in shape[1:]):
            raise UserError(
                f"pictures of {shape[1]}x{shape[2]} do not divide by {self.factor}, the factor of the teacher's "
                "autoencoder",
                hint="data.size and data.resize bring them to a size that does",
            )
        return (self.channels, shape[1] // self.factor, shape[2] // self.factor)


def geometry(config: dict[str, Any]) -> Geometry:
    """Read an autoencoder's config.json. UserError for what is no AutoencoderKL."""
    kind = config.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise UserError(f"the teacher's autoencoder is a {kind}, msd knows AutoencoderKL")
    try:
        levels = len(config["block_out_channels"])
        return Geometry(int(config.get("in_channels", 3)), int(config["latent_channels"]), 2 ** (levels - 1))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the autoencoder's config.json does not say its size: {error}") from None


class Autoencoder(nn.Module):
    """Pictures in [-1, 1] to latents z = (l - shift) scale, as the teacher knows them, and back; in float32.

    Shift and scale are the configuration's: one number each, or one per channel.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: nn.Module, config: dict[str, Any]) -> None:
        super().__init__()
        self.net = net
        self.geometry = geometry(config)
        shift, scale = _shift_and_scale(config, self.geometry.channels)
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latents' posterior, [n, c, h, w] each, in the teacher's units."""
        found = [self.net.encode(part).latent_dist for part in self._parts(images, 1)]  # type: ignore[operator]
        mean, std = torch.cat([d.mean for d in found]), torch.cat([d.std for d in found])
        return (mean - self.shift) * self.scale, std * self.scale.abs()

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Return the pictures of the latents `z`, float32 [n, channels, height, width], about in [-1, 1]."""
        factor = self.geometry.factor
        if not len(z):
            return z.new_zeros(0, self.geometry.image_channels, *(factor * side for side in z.shape[2:]))
        latents = (z.to(torch.float32) / self.scale + self.shift).split(self._batch(z, factor))
        return torch.cat([self.net.decode(part, return_dict=False)[0] for part in latents])  # type: ignore[operator]

    def _parts(self, x: Tensor, factor: int) -> tuple[Tensor, ...]:
        return x.to(torch.float32).split(self._batch(x, factor))

    def _batch(self, x: Tensor, factor: int) -> int:
        return max(1, PIXELS_AT_ONCE // (math.prod(x.shape[-2:]) * factor**2))


def _shift_and_scale(config: dict[str, Any], channels: int) -> tuple[Tensor, Tensor]:
    """Return both as float32 [1, c, 1, 1]."""
    shift = config.get("latents_mean") or [config.get("shift_factor") or 0.0]
    scaling = config.get("scaling_factor") or 1.0
    scale = [scaling / s for s in config.get("latents_std") or [1.0]]
    tensors = []
    for name, values in (("mean", shift), ("scale", scale)):
        numbers = torch.tensor(values, dtype=torch.float32)
        if numbers.ndim != 1 or len(numbers) not in (1, channels) or not numbers.isfinite().all():
            raise UserError(f"the autoencoder's config.json gives no {name} of {channels} channels: {values}")
        tensors.append(numbers.expand(channels).reshape(1, channels, 1, 1).clone())
    return tensors[0], tensors[1]


def build_autoencoder(config: dict[str, Any]) -> Autoencoder:
    """Build the autoencoder of a config.json, with random weights."""
    geometry(config)  # is it one?
    options = {k: v for k, v in config.items() if not k.startswith("_")}
    try:
        net = import_diffusers().AutoencoderKL.from_config(options)
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise UserError(f"no autoencoder fits its config.json ({error})") from None
    return Autoencoder(net, config).requires_grad_(False).eval()
