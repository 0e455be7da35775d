"""EDM2's magnitude-preserving U-Net (Karras et al. 2024, arXiv 2312.02696); equation numbers are that paper's.

Written from the paper. Constructor arguments and the names of parameters and buffers are those of the published
checkpoints, so that their weights map by name and shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msdcli.diffusion.perturbed_attention import attention
from msdcli.nets.edm.preconditioning import Preconditioned
from msdcli.nets.edm.unet_taps import (
    Cell,
    ExactBuffers,
    TappedUNet,
    attends,
    decoder_cells,
    encoder_cells,
    fir,
    is_box,
    resample,
)

Module = TypeVar("Module", bound=nn.Module)


def normalize(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Scale to a root mean square of 1 over `dim`."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    count = math.prod([x.shape[i] for i in ((dim,) if isinstance(dim, int) else dim)])  # a generator does not compile
    scale: Tensor = 1e-4 + norm * math.sqrt(1 / count)
    return x / scale.to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU that keeps the magnitude of unit normal input (Eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b, scaled to keep the magnitude (Eq. 88)."""
    return a.lerp(b.to(a.dtype), t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Concatenate channels so that `b` contributes the fraction t whatever the two widths (Eq. 103)."""
    num_a, num_b = a.shape[1], b.shape[1]
    scale = math.sqrt((num_a + num_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale / math.sqrt(num_a) * (1 - t)), b * (scale / math.sqrt(num_b) * t)], dim=1)


class MPFourier(ExactBuffers):
    """Random Fourier features of the noise label (Eq. 75)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(num_channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(num_channels))

    def forward(self, c_noise: Tensor) -> Tensor:
        angles = c_noise.to(torch.float32)[:, None] * self.freqs + self.phases
        return angles.cos() * math.sqrt(2)


class MPConv(nn.Module):
    """A linear layer (`kernel` 0) or convolution whose filters have unit magnitude (Eq. 47).

    In training the weight itself is kept at unit magnitude too (forced normalisation, Eq. 66), by whoever calls the
    network: `settle`. `frozen` makes the weight a buffer that nothing trains.
    """

    weight: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, frozen: bool = False) -> None:
        super().__init__()
        weight = torch.randn(out_channels, in_channels, *[kernel] * 2 * bool(kernel))
        if frozen:
            self.register_buffer("weight", weight)
        else:
            self.weight = nn.Parameter(weight)
        self.normalized_at = (-1, -1)

    @torch.no_grad()
    def force_normalization(self) -> None:
        """Normalise the weight in place, once after each change of it; of a sharded one this process' filters.

        Not in every call: a second call before the backward pass would change what the first one saved for it.
        """
        if not (self.training and self.weight.requires_grad):
            return
        weight: Tensor = self.weight.to_local() if hasattr(self.weight, "to_local") else self.weight
        if (self.weight._version, weight._version) != self.normalized_at:  # changes count in either
            weight.copy_(normalize(weight.to(torch.float32), self.over))
            self.normalized_at = (self.weight._version, weight._version)

    @property
    def over(self) -> tuple[int, ...]:
        return tuple(range(1, self.weight.ndim))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        w = normalize(self.weight.to(torch.float32), self.over)
        w = (w * (gain / math.sqrt(w[0].numel()))).to(x.dtype)
        return F.linear(x, w) if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class Block(nn.Module):
    """An encoder or decoder block with optional self-attention (Fig. 21)."""

    perturbed = False

    def __init__(
        self,
        cell: Cell,
        emb_channels: int,
        *,
        decoder: bool,
        attention: bool,
        resample_filter: Sequence[float] = (1, 1),
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
    ) -> None:
        super().__init__()
        cin, cout = cell.in_channels, cell.out_channels
        self.mode, self.decoder, self.resample_filter = cell.mode, decoder, tuple(resample_filter)
        self.num_heads = cout // channels_per_head if attention else 0
        self.dropout, self.clip_act = dropout, clip_act
        self.res_balance, self.attn_balance = res_balance, attn_balance
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(cin if decoder else cout, cout, 3)
        self.emb_linear = MPConv(emb_channels, cout, 0)
        self.conv_res1 = MPConv(cout, cout, 3)
        self.conv_skip = MPConv(cin, cout, 1) if cin != cout else None
        self.attn_qkv = MPConv(cout, 3 * cout, 1) if self.num_heads else None
        self.attn_proj = MPConv(cout, cout, 1) if self.num_heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.resample(x)
        skip = x if self.conv_skip is None else self.conv_skip(x)
        if not self.decoder:
            x = skip = normalize(skip, 1)
        c = self.emb_linear(emb, self.emb_gain) + 1
        y = mp_silu(self.conv_res0(mp_silu(x)) * c.to(x.dtype)[:, :, None, None])
        y = self.conv_res1(F.dropout(y, self.dropout, self.training))
        x = mp_sum(skip, y, self.res_balance)
        if self.attn_qkv is not None and self.attn_proj is not None:
            x = mp_sum(x, self.attn_proj(self.attend(self.attn_qkv(x))), self.attn_balance)
        return x if self.clip_act is None else x.clip(-self.clip_act, self.clip_act)

    def resample(self, x: Tensor) -> Tensor:
        if self.mode == "keep":
            return x
        f = None if is_box(self.resample_filter) else fir(self.resample_filter).to(x.device)
        return resample(x, f, self.mode)

    @property
    def has_attention(self) -> bool:
        """Whether the block has self-attention."""
        return bool(self.num_heads)

    def attend(self, qkv: Tensor) -> Tensor:
        """Cosine attention: queries, keys and values have unit magnitude. `qkv` [n, 3 channels, h, w]."""
        n, width, h, w = qkv.shape
        # The published weights interleave query, key and value inside each head. Contiguous: else no kernel is fused.
        qkv = normalize(qkv.reshape(n, self.num_heads, width // 3 // self.num_heads, 3, h * w), 2)
        q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous()  # each [n, heads, pixels, channels per head]
        return attention(self, q, k, v).transpose(2, 3).reshape(n, width // 3, h, w)


class EDM2UNet(TappedUNet):
    """EDM2's U-Net; with `model_channels` 128 / 192 / 256 / 320 / 384 / 448 it is size XS / S / M / L / XL / XXL."""

    def __init__(
        self,
        *,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        resample_filter: Sequence[float] = (1, 1),
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
    ) -> None:
        super().__init__()
        levels = [(img_resolution >> level, model_channels * mult) for level, mult in enumerate(channel_mult)]
        widths = [width for _, width in levels]
        noise_channels = model_channels * channel_mult_noise if channel_mult_noise else widths[0]
        emb_channels = model_channels * channel_mult_emb if channel_mult_emb else max(widths)
        self.label_balance, self.concat_balance = label_balance, concat_balance
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(noise_channels)
        self.emb_noise = MPConv(noise_channels, emb_channels, 0)
        self.emb_label = MPConv(label_dim, emb_channels, 0) if label_dim else None

        def block(cell: Cell, decoder: bool) -> Block:
            return Block(
                cell,
                emb_channels,
                decoder=decoder,
                attention=attends(cell, attn_resolutions),
                resample_filter=resample_filter,
                channels_per_head=channels_per_head,
                dropout=dropout,
                res_balance=res_balance,
                attn_balance=attn_balance,
                clip_act=clip_act,
            )

        # One more input channel, of ones, stands in for the biases that no layer has.
        cells = encoder_cells(levels, num_blocks=num_blocks, first=(in_channels + 1, widths[0]))
        decoder = decoder_cells(levels, num_blocks=num_blocks, encoder=cells)
        first = MPConv(in_channels + 1, widths[0], 3)
        self.enc = nn.ModuleDict({cells[0].name: first} | {cell.name: block(cell, False) for cell in cells[1:]})
        self.dec = nn.ModuleDict({cell.name: block(cell, True) for cell in decoder})
        self.out_conv = MPConv(widths[0], out_channels, 3)

    def class_vectors(self) -> Tensor | None:
        return None if self.emb_label is None else self.emb_label.weight.T

    def settle(self) -> None:
        for module in self.modules():
            if isinstance(module, MPConv):
                module.force_normalization()

    def embed(self, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        emb = self.emb_noise(self.emb_fourier(c_noise))
        if self.emb_label is not None and labels is not None:
            emb = mp_sum(emb, self.emb_label(labels * math.sqrt(labels.shape[1])), self.label_balance)
        return mp_silu(emb)

    def encode(self, x: Tensor, emb: Tensor, *, last: str | None = None) -> dict[str, Tensor]:
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips: dict[str, Tensor] = {}
        for name, block in self.enc.items():
            x = skips[name] = block(x, emb) if isinstance(block, Block) else block(x)
            if name == last:
                break
        return skips

    def decode(self, skips: dict[str, Tensor], emb: Tensor) -> Tensor:
        stack = list(skips.values())
        x = stack[-1]
        for name, block in self.dec.items():
            x = block(mp_cat(x, stack.pop(), self.concat_balance) if "block" in name else x, emb)
        y: Tensor = self.out_conv(x, self.out_gain)
        return y


@torch.no_grad()
def round_gains(net: EDM2UNet) -> None:
    """Round the gains in place as the original does where it keeps the weights in half precision, as published.

    It divides a gain by the root of the layer's fan-in before anything becomes float32. Without this rounding the
    output is up to 4e-4 (relative) away from the original's.
    """
    blocks = [block for block in net.modules() if isinstance(block, Block)]
    layers = [(block.emb_gain, block.emb_linear) for block in blocks] + [(net.out_gain, net.out_conv)]
    for gain, layer in layers:
        root = math.sqrt(layer.weight[0].numel())
        gain.copy_((gain.to(torch.float16) / root).to(torch.float32) * root)


class BakedConv(nn.Module):
    """An MPConv that will not be trained: the weight is normalised once and for all, a gain scales the output."""

    weight: Tensor

    def __init__(self, layer: MPConv) -> None:
        super().__init__()
        w = normalize(layer.weight.detach().to(torch.float32), layer.over)
        self.register_buffer("weight", w / math.sqrt(w[0].numel()))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        w = self.weight.to(x.dtype)
        y = F.linear(x, w) if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)
        return y if isinstance(gain, float) and gain == 1 else y * gain


def bake(net: Module) -> Module:
    """Replace every MPConv inside `net`, in place, by what it is without training; return `net`."""
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, MPConv):
                parent.add_module(name, BakedConv(child))
    return net


class EDM2(Preconditioned):
    """EDM's preconditioning with EDM2's estimate of the loss's variance (Eq. 21), which stays as it was trained."""

    def __init__(
        self,
        net: TappedUNet,
        *,
        shape: tuple[int, ...],
        num_classes: int,
        sigma_data: float = 0.5,
        logvar_channels: int = 128,
    ) -> None:
        super().__init__(net, shape=shape, num_classes=num_classes, sigma_data=sigma_data)
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1, 0, frozen=True)

    def logvar(self, sigma: Tensor) -> Tensor:
        """u(sigma): the logarithm of the denoising loss's variance at `sigma` [n], [n]."""
        y: Tensor = self.logvar_linear(self.logvar_fourier(sigma.to(torch.float32).log() / 4))
        return y.flatten()
