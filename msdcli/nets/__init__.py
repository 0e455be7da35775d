"""Networks: built from a recipe's section, stored with their settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msdcli.diffusion.denoiser import Denoiser
from msdcli.errors import UserError
from msdcli.nets.mlp import MLP
from msdcli.nets.unet import UNet
from msdcli.recipe import MLPSettings

if TYPE_CHECKING:
    from msdcli.recipe import NetworkSettings


def build(settings: NetworkSettings, *, shape: tuple[int, ...], num_classes: int, sigma_data: float) -> Denoiser:
    """Build the denoiser of a network section for images of `shape`. UserError where the two do not fit."""
    if isinstance(settings, MLPSettings):
        if len(shape) != 1:
            raise UserError(
                f"network kind 'mlp' is for points, the data are images of shape {shape}", hint="kind: unet"
            )
        net: MLP | UNet = MLP(settings, shape=shape, num_classes=num_classes)
    else:
        divisor = 2 ** (len(settings.multipliers) - 1)
        if len(shape) != 3:
            raise UserError(f"network kind 'unet' is for images, the data have shape {shape}", hint="kind: mlp")
        if shape[1] % divisor or shape[2] % divisor:
            raise UserError(f"{len(settings.multipliers)} levels need sides divisible by {divisor}, not {shape[1:]}")
        net = UNet(settings, shape=shape, num_classes=num_classes)
    return Denoiser(net, shape=shape, num_classes=num_classes, sigma_data=sigma_data)
