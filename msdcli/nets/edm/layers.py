"""What the U-Nets of EDM (Karras et al. 2022, arXiv 2206.00364) are built from; names are those of its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msdcli.diffusion.perturbed_attention import attention
from msdcli.nets.edm.unet_taps import (
    Cell,
    ExactBuffers,
    Mode,
    fir,
    is_box,
    resample,
)
from msdcli.nets.layers import Conv2d, GroupNorm, Linear


class Unused(nn.Module):
    """A weight [out, in] that a checkpoint holds and D never reads: a buffer, so that nothing trains it."""

    weight: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(out_features, in_features))


class Resample(nn.Module):
    """Halve or double the resolution."""

    resample_filter: Tensor

    def __init__(self, mode: Mode, taps: Sequence[float]) -> None:
        super().__init__()
        self.mode, self.box = mode, is_box(taps)
        self.register_buffer("resample_filter", fir(taps)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        return resample(x, None if self.box else self.resample_filter[0, 0], self.mode)


class Conv(Conv2d):
    """A convolution after a change of resolution, or (`filter_last`) a convolution and then the halving, with zeros
    around the input only. Like ADM, it starts as torch's layers do. It can be made as torch's `Conv2d` is, too."""

    resample_filter: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | None = None,
        *,
        mode: Mode = "keep",
        taps: Sequence[float] = (1, 1),
        filter_last: bool = False,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        if padding is None:
            size = kernel if isinstance(kernel, int) else kernel[0]
            padding = size // 2 + ((len(taps) - 1) // 2 if filter_last else 0)
        super().__init__(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=bias)
        self.mode, self.box, self.filter_last = mode, is_box(taps), filter_last
        self.register_buffer("resample_filter", None if mode == "keep" else fir(taps)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        if self.resample_filter is None:
            return super().forward(x)
        f = None if self.box else self.resample_filter[0, 0]
        if self.filter_last:
            return resample(super().forward(x), f, self.mode, padding=0)
        return super().forward(resample(x, f, self.mode))


def group_norm(num_channels: int, eps: float) -> GroupNorm:
    return GroupNorm(min(32, num_channels // 4), num_channels, eps)


class Block(nn.Module):
    """A residual block with an optional change of resolution and self-attention: all that the three networks need.

    `adaptive_scale` is ADM's scale and shift by the embedding, otherwise it is added; `project_skip` puts a
    convolution on every resampled skip; sums are multiplied by `skip_scale`.
    """

    perturbed = False

    def __init__(
        self,
        cell: Cell,
        emb_channels: int,
        *,
        num_heads: int,
        dropout: float,
        taps: Sequence[float] = (1, 1),
        eps: float = 1e-5,
        skip_scale: float = 1.0,
        adaptive_scale: bool = True,
        project_skip: bool = False,
    ) -> None:
        super().__init__()
        cin, cout, mode = cell.in_channels, cell.out_channels, cell.mode
        self.num_heads, self.dropout = num_heads, dropout
        self.skip_scale, self.adaptive_scale = skip_scale, adaptive_scale
        self.norm0 = group_norm(cin, eps)
        self.conv0 = Conv(cin, cout, 3, mode=mode, taps=taps)
        self.affine = Linear(emb_channels, cout * (2 if adaptive_scale else 1))
        self.norm1 = group_norm(cout, eps)
        self.conv1 = Conv(cout, cout, 3)
        self.skip: nn.Module = nn.Identity()
        if cin != cout or (project_skip and mode != "keep"):
            self.skip = Conv(cin, cout, 1, mode=mode, taps=taps)
        elif mode != "keep":
            self.skip = Resample(mode, taps)
        if num_heads:
            self.norm2 = group_norm(cout, eps)
            self.qkv = Conv(cout, 3 * cout, 1)
            self.proj = Conv(cout, cout, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        modulation = self.affine(emb).to(h.dtype)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = modulation.chunk(2, dim=1)
            h = F.silu(shift + self.norm1(h) * (scale + 1))
        else:
            h = F.silu(self.norm1(h + modulation))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (self.skip(x) + h) * self.skip_scale
        return (x + self.proj(self.attend(x))) * self.skip_scale if self.num_heads else x

    @property
    def has_attention(self) -> bool:
        """Whether the block has self-attention."""
        return bool(self.num_heads)

    def attend(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        # The published weights interleave query, key and value inside each head. Contiguous: else no kernel is fused.
        qkv = self.qkv(self.norm2(x)).reshape(n, self.num_heads, channels // self.num_heads, 3, height * width)
        q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous()  # each [n, heads, pixels, channels per head]
        return attention(self, q, k, v).transpose(2, 3).reshape(x.shape)


class PositionalEmbedding(nn.Module):
    """cos and sin of the noise label at frequencies from 1 down to 1/10000 (included only with `endpoint`)."""

    def __init__(self, num_channels: int, *, endpoint: bool) -> None:
        super().__init__()
        self.num_channels, self.endpoint = num_channels, endpoint

    def forward(self, c_noise: Tensor) -> Tensor:
        half = self.num_channels // 2
        exponents = torch.arange(half, dtype=torch.float32, device=c_noise.device) / (half - int(self.endpoint))
        # float32 on purpose: labels go up to 999, where the last bit of a frequency is seen in the output.
        angles = c_noise[:, None] * (1 / 10000) ** exponents
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(ExactBuffers):
    """cos and sin of the noise label at fixed random frequencies, normal with standard deviation 16."""

    freqs: Tensor

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(num_channels // 2) * 16)

    def forward(self, c_noise: Tensor) -> Tensor:
        angles = c_noise[:, None] * (2 * math.pi * self.freqs)
        return torch.cat([angles.cos(), angles.sin()], dim=1)
