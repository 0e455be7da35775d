"""A class-conditional U-Net with residual blocks and optional attention, from 8x8 digits to 64x64 RGB.

After the DDPM++/ADM family as Karras et al. arranged it (2022, arXiv 2206.00364, Appendix F): adaptive group norm,
skips scaled by sqrt(1/2), every residual branch and the output starting at zero. With `patch`, squares of pixels are
the channels of a smaller image (Luhman and Luhman 2022, arXiv 2207.04316).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msdcli.diffusion.perturbed_attention import attention
from msdcli.nets.embedding import Embedding, tap_number, zeroed
from msdcli.nets.layers import Conv2d, GroupNorm, Linear, computing_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    from msdcli.recipe.networks import UNetSettings


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of `number` that is at most `limit` (and at least 1)."""
    return next(d for d in range(max(1, min(limit, number)), 0, -1) if number % d == 0)


def group_norm(channels: int) -> GroupNorm:
    """At most 32 groups of at least 4 channels; any number of channels has such a division."""
    return GroupNorm(largest_divisor(channels, min(32, channels // 4)), channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, twice; the second norm is scaled and shifted by the embedding; attention last if asked for.

    `inputs` are the channels of the tensors that its input is put together from.
    """

    def __init__(
        self, inputs: tuple[int, ...], c_out: int, embedding: int, *, resample: str, attention: bool, dropout: float
    ) -> None:
        super().__init__()
        c_in = sum(inputs)
        self.inputs = inputs
        self.resample = resample
        self.dropout = dropout
        self.norm0 = group_norm(c_in)
        self.conv0 = Conv2d(c_in, c_out, 3, padding=1)
        self.affine = Linear(embedding, 2 * c_out)
        self.norm1 = group_norm(c_out)
        self.conv1 = zeroed(Conv2d(c_out, c_out, 3, padding=1))
        self.skip = Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out) if attention else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.affine(embedding).to(x.dtype)[:, :, None, None].chunk(2, dim=1)
        h = self.conv0(self._resampled(F.silu(self.norm0(x))))
        h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (self.skip(self._resampled(x)) + h) * math.sqrt(0.5)
        return x if self.attention is None else self.attention(x)

    def _resampled(self, x: Tensor) -> Tensor:
        return resampled(x, self.resample)


def resampled(x: Tensor, how: str) -> Tensor:
    """Return an image at half (`down`) or twice (`up`) its size, else as it is."""
    if how == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2, mode="nearest") if how == "up" else x


class SkipBlock(nn.Module):
    """What is left of a residual block without its branch and its attention: what it gives where both give zero."""

    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        self.skip, self.resample = block.skip, block.resample
        self.scale = math.sqrt(0.5) if block.attention is None else 0.5

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.skip(resampled(x, self.resample)) * self.scale


class Attention(nn.Module):
    """Self-attention over positions, in heads of about 64 channels."""

    has_attention, perturbed = True, False

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = largest_divisor(channels, max(1, channels // 64))
        self.norm = group_norm(channels)
        self.qkv = Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, channels // self.heads, height * width)
        q, k, v = qkv.transpose(-1, -2).contiguous().unbind(1)  # each [batch, heads, positions, channels of a head]
        h = attention(self, q, k, v).transpose(-1, -2).reshape(x.shape)
        return (x + self.out(h)) * math.sqrt(0.5)


class UNet(nn.Module):
    """The raw network F(x, c_noise, condition): x [batch, channels, height, width] to the same shape.

    Blocks have names: `enc.8x8.0` is the first encoder block at resolution 8x8; `taps` lists those of the encoder.
    """

    def __init__(self, settings: UNetSettings, *, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.patch = settings.patch
        image_channels, size = shape[0] * self.patch**2, shape[1] // self.patch
        self.embedding = Embedding(settings.embedding or 4 * settings.channels, num_classes)
        widths = [settings.channels * m for m in settings.multipliers]
        sizes = [size >> level for level in range(len(widths))]

        def block(inputs: tuple[int, ...], c_out: int, at: int, resample: str = "") -> ResidualBlock:
            wants = at in settings.attention
            e = self.embedding.width
            return ResidualBlock(inputs, c_out, e, resample=resample, attention=wants, dropout=settings.dropout)

        # Encoder: every output is a skip.
        self.conv_in = Conv2d(image_channels, widths[0], 3, padding=1)
        self.encoder = nn.ModuleDict()
        skips, c = [widths[0]], widths[0]
        for level, (width, at) in enumerate(zip(widths, sizes, strict=True)):
            if level > 0:
                self.encoder[f"{at}x{at}_down"] = block((c,), c, at, "down")
                skips.append(c)
            for i in range(settings.blocks):
                self.encoder[f"{at}x{at}_{i}"] = block((c,), width, at)
                c = width
                skips.append(c)

        # Decoder: the mirror image, one block more per level.
        self.middle = block((c,), c, sizes[-1])
        self.decoder = nn.ModuleDict()
        for level, (width, at) in reversed([*enumerate(zip(widths, sizes, strict=True))]):
            for i in range(settings.blocks + 1):
                self.decoder[f"{at}x{at}_{i}"] = block((c, skips.pop()), width, at)
                c = width
            if level > 0:
                self.decoder[f"{at}x{at}_up"] = block((c,), c, sizes[level - 1], "up")
        self.norm_out = group_norm(c)
        self.conv_out = zeroed(Conv2d(c, image_channels, 3, padding=1))
        for name in settings.left_out:
            leave_out(self, name)

    @property
    def taps(self) -> list[str]:
        """The names of the encoder's blocks, in order, and of the bottleneck."""
        return [*self.encoder.keys(), "middle"]  # torch 2.11 cannot compile a ModuleDict unpacked by itself

    def forward(
        self, x: Tensor, c_noise: Tensor, condition: Tensor | None, taps: Sequence[str] | None = None
    ) -> Tensor | list[Tensor]:
        """Return the raw output, or with `taps` the features of these blocks."""
        if taps is not None:
            return self.features(x, c_noise, condition, taps)
        embedding = self.embedding(c_noise, condition)
        h = self._first(x)
        skips = [h]
        for block in self.encoder.values():
            h = block(h, embedding)
            skips.append(h)
        h = self.middle(h, embedding)
        for name, block in self.decoder.items():
            h = block(h if name.endswith("_up") else torch.cat([h, skips.pop()], dim=1), embedding)
        out = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(out, self.patch) if self.patch > 1 else out

    def features(self, x: Tensor, c_noise: Tensor, condition: Tensor | None, taps: Sequence[str]) -> list[Tensor]:
        """Return what the named encoder blocks give, in the order asked for; the decoder does not run."""
        numbers = [tap_number(self.taps, tap) for tap in taps]
        embedding = self.embedding(c_noise, condition)
        found: list[Tensor] = []
        h = self._first(x)
        for block in [*self.encoder.values(), self.middle][: max(numbers) + 1]:
            h = block(h, embedding)
            found.append(h)
        return [found[i] for i in numbers]

    def _first(self, x: Tensor) -> Tensor:
        x = x.to(computing_in(self))
        return self.conv_in(F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)


def leave_out(net: nn.Module, name: str) -> ResidualBlock:
    """Leave out a block of a U-Net by its name (middle, decoder.8x8_1); return it. ValueError where there is none."""
    block = dict(net.named_modules()).get(name)
    if not isinstance(block, ResidualBlock):
        raise ValueError(f"without: there is no block {name!r}")
    put(net, name, SkipBlock(block))
    return block


def put(net: nn.Module, name: str, block: nn.Module) -> None:
    """Put a block in the place of that name."""
    group, _, own = name.rpartition(".")
    place = net.get_submodule(group)
    if isinstance(place, nn.ModuleDict):
        place[own] = block
    else:
        setattr(place, own, block)
