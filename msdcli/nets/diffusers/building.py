"""Networks of the diffusers library, built from a recipe's section with random weights."""

from __future__ import annotations

import torch
from torch import Tensor

from msdcli.errors import UserError
from msdcli.nets.diffusers.denoiser import DiffusersDenoiser
from msdcli.nets.diffusers.files import import_diffusers
from msdcli.nets.diffusers.text_denoiser import TextDenoiser, check_section
from msdcli.recipe.networks import DiffusersNetworkSettings


def build_diffusers(settings: DiffusersNetworkSettings) -> DiffusersDenoiser:
    """Build the network of a section, with random weights."""
    diffusers = import_diffusers()
    if "sample_size" not in settings.config or "in_channels" not in settings.config:
        raise UserError("network kind 'diffusers': config needs sample_size and in_channels")
    if settings.reads_text:
        check_section(settings)
    try:
        net = getattr(diffusers, settings.class_name).from_config(settings.config)
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"network kind 'diffusers': no network fits this config ({error})") from None
    for module in net.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0  # DiT drops classes while training; a one-step student is told its class
    kind = TextDenoiser if settings.reads_text else DiffusersDenoiser
    return kind(net, settings, log_sigmas(settings))


def log_sigmas(settings: DiffusersNetworkSettings) -> Tensor:
    """The schedule's noise levels as logarithms, ascending."""
    if settings.prediction == "flow":
        return torch.empty(0, device="cpu")
    with torch.device("cpu"):
        alpha_bar = import_diffusers().DDPMScheduler(**settings.schedule).alphas_cumprod.double()
    levels = ((1 - alpha_bar) / alpha_bar).sqrt().log().float()
    return levels.to(torch.get_default_device())
