"""Discriminator heads on a denoiser's features: one per tap, one logit per image (DMD2, arXiv 2405.14867)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from msdcli.diffusion.denoiser import Denoiser
from msdcli.nets.layers import Conv2d, Linear
from msdcli.nets.unet import group_norm


class Head(nn.Sequential):
    """Features to one logit: stride-2 convolutions down to 4x4 at most, one over what is left, one to the logit.

    Features without positions go through two layers instead.
    """

    def __init__(self, shape: Sequence[int]) -> None:
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
    """The mean logit of one head per tap: [batch] float32. UserError if the denoiser has no such tap."""

    def __init__(self, denoiser: Denoiser, taps: Sequence[str]) -> None:
        super().__init__()
        device = next(denoiser.parameters()).device
        with torch.no_grad():
            x, sigma = torch.zeros(1, *denoiser.shape, device=device), torch.ones(1, device=device)
            condition = torch.zeros(1, dtype=torch.int64, device=device)
            features = denoiser.features(x, sigma, condition, taps)
        self.heads = nn.ModuleList(Head(f.shape[1:]) for f in features)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.stack([head(f) for head, f in zip(self.heads, features, strict=True)]).to(torch.float32).mean(0)
