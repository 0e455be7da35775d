"""Networks: built from a recipe's section, stored with their settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from msdcli.diffusion.denoiser import Denoiser
from msdcli.errors import UserError
from msdcli.nets.diffusers.building import build_diffusers
from msdcli.nets.edm import importing as edm_import
from msdcli.nets.mlp import MLP
from msdcli.nets.unet import UNet
from msdcli.recipe.networks import DiffusersNetworkSettings, EdmNetworkSettings, MLPSettings

if TYPE_CHECKING:
    from msdcli.recipe.networks import NetworkSettings, UNetSettings


def build(settings: NetworkSettings, *, shape: tuple[int, ...], num_classes: int, sigma_data: float) -> Denoiser:
    """Build the denoiser of a network section for images of `shape`. UserError where the two do not fit.

    It remembers its section (kind edm: with all arguments) as `settings`.
    """
    if isinstance(settings, EdmNetworkSettings):
        return _edm(settings, shape, num_classes, sigma_data)
    if isinstance(settings, DiffusersNetworkSettings):
        built = build_diffusers(settings)
        if (built.shape, built.num_classes) != (tuple(shape), num_classes):
            raise UserError(f"network kind 'diffusers' makes {list(built.shape)} in {built.num_classes} classes")
        return built
    net = (
        _mlp(settings, shape, num_classes) if isinstance(settings, MLPSettings) else _unet(settings, shape, num_classes)
    )
    denoiser = Denoiser(net, shape=shape, num_classes=num_classes, sigma_data=sigma_data)
    denoiser.settings = settings
    return denoiser


def build_like(settings: NetworkSettings, like: Denoiser) -> Denoiser:
    """Build the denoiser of a network section for the images and classes of another denoiser."""
    return build(settings, shape=like.shape, num_classes=like.num_classes, sigma_data=like.sigma_data)


def _mlp(settings: MLPSettings, shape: tuple[int, ...], num_classes: int) -> MLP:
    if len(shape) != 1:
        raise UserError(f"network kind 'mlp' is for points, the data are images of shape {shape}", hint="kind: unet")
    return MLP(settings, shape=shape, num_classes=num_classes)


def _unet(settings: UNetSettings, shape: tuple[int, ...], num_classes: int) -> UNet:
    divisor = settings.patch * 2 ** (len(settings.multipliers) - 1)
    if len(shape) != 3:
        raise UserError(f"network kind 'unet' is for images, the data have shape {shape}", hint="kind: mlp")
    if shape[1] % divisor or shape[2] % divisor:
        of = f" of patches of {settings.patch}" if settings.patch > 1 else ""
        raise UserError(f"{len(settings.multipliers)} levels{of} need sides divisible by {divisor}, not {shape[1:]}")
    return UNet(settings, shape=shape, num_classes=num_classes)


def _edm(settings: EdmNetworkSettings, shape: tuple[int, ...], num_classes: int, sigma_data: float) -> Denoiser:
    """Size and classes are those of the data; arguments that say otherwise are refused."""
    if len(shape) != 3 or shape[1] != shape[2]:
        raise UserError(f"network kind 'edm' is for square images, the data have shape {shape}", hint="kind: mlp")
    wanted = {"img_resolution": shape[1], "img_channels": shape[0], "label_dim": num_classes}
    for name, value in wanted.items():
        if settings.arguments.get(name, value) != value:
            raise UserError(f"network kind 'edm': {name} is {settings.arguments[name]}, the data make it {value}")
    arguments = wanted | settings.arguments
    if settings.preconditioning in ("EDM", "EDM2"):
        arguments = {"sigma_data": sigma_data} | arguments
    description = {"kind": "edm", "preconditioning": settings.preconditioning, "arguments": arguments}
    denoiser = edm_import.build_edm(description, device=torch.get_default_device())
    denoiser.settings = settings.model_copy(update={"arguments": edm_import.complete_arguments(description)})
    return denoiser
