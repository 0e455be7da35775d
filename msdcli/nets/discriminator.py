"""Discriminator heads on a denoiser's features: one per tap, one logit per image (DMD2, arXiv 2405.14867)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from msdcli.diffusion.denoiser import Denoiser
from msdcli.errors import UserError
from msdcli.nets.layers import Conv2d, GroupNorm, Linear
from msdcli.nets.unet import group_norm


def groups_of_dmd2(channels: int) -> GroupNorm:
    """32 groups, torch's own epsilon: the heads of DMD2 and of FastGen. UserError where there are no 32 groups."""
    if channels % 32:
        raise UserError(f"head_norm dmd2 makes 32 groups, a tap has {channels} channels", hint="head_norm: unet")
    return GroupNorm(32, channels, eps=1e-5)


NORMS: dict[str, Callable[[int], nn.Module]] = {"unet": group_norm, "dmd2": groups_of_dmd2}


class Head(nn.Sequential):
    """Features to one logit: stride-2 convolutions down to 4x4 at most, one over what is left, one to the logit.

    Features without positions go through two layers instead. `norm` says how channels are grouped (`NORMS`).
    """

    def __init__(self, shape: Sequence[int], *, norm: str = "unet") -> None:
        group_norm = NORMS[norm]
        channels = shape[0]
        if len(shape) == 1:
            super().__init__(Linear(channels, channels), nn.SiLU(), Linear(channels, 1), nn.Flatten(0))
            return
        size, layers = min(shape[1:]), list[nn.Module]()
        while size > 4:
            layers += [Conv2d(channels, channels, 4, stride=2, padding=1), group_norm(channels), nn.SiLU()]
            size //= 2
        layers += [Conv2d(channels, channels, size), group_norm(channels), nn.SiLU(), Conv2d(channels, 1, 1)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(0))


class Discriminator(nn.Module):
    """One head per tap: logits [taps, batch] float32. UserError if the denoiser has no such tap."""

    def __init__(self, denoiser: Denoiser, taps: Sequence[str], *, norm: str = "unet") -> None:
        super().__init__()
        device = next(denoiser.parameters()).device
        with torch.no_grad():
            x, sigma = torch.zeros(1, *denoiser.shape, device=device), torch.ones(1, device=device)
            condition = torch.zeros(1, dtype=torch.int64, device=device)
            features = denoiser.features(x, sigma, condition, taps)
        self.heads = nn.ModuleList(Head(f.shape[1:], norm=norm) for f in features)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.stack([head(f) for head, f in zip(self.heads, features, strict=True)]).to(torch.float32)
