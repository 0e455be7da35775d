"""Networks of the diffusers library as denoisers in sigma space: eps, v, sample and flow prediction.

The library builds the network from its configuration; the configuration is JSON and the weights safetensors, so
nothing in a folder is run. Needs the extra `diffusers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from msdcli.diffusion.denoiser import Denoiser, per_image
from msdcli.nets.diffusers import taps as diffusers_taps
from msdcli.recipe.networks import DiffusersNetworkSettings


class DiffusersDenoiser(Denoiser):
    """D(x, sigma, condition) around `net(x_t, t, class_labels)`, by the table of changes of variables.

    `log_sigmas` [T] are the schedule's noise levels, ln(sqrt((1 - alpha_bar) / alpha_bar)); empty for a flow. `t` is
    interpolated between them, and held at their ends.
    """

    log_sigmas: Tensor

    def __init__(self, net: nn.Module, settings: DiffusersNetworkSettings, log_sigmas: Tensor) -> None:
        config = settings.config
        size = config["sample_size"]
        num_classes = config.get("num_class_embeds" if settings.class_name == "UNet2DModel" else "num_embeds_ada_norm")
        super().__init__(net, shape=(config["in_channels"], size, size), num_classes=num_classes or 0)
        self.settings, self.prediction = settings, settings.prediction
        self.steps = settings.schedule.get("num_train_timesteps", 1000)
        self.register_buffer("log_sigmas", log_sigmas, persistent=False)

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        x, sigma = x.to(torch.float32), sigma.to(torch.float32)
        s = per_image(sigma, x)
        F_x = self.predict(*self.as_trained(x, sigma), condition)
        if self.prediction == "flow":  # x_t = (1 - t) y + t n, v = n - y
            return x / (1 + s) - s / (1 + s) * F_x
        root = (1 + s.square()).sqrt()
        if self.prediction == "epsilon":
            return x - s * F_x
        if self.prediction == "v_prediction":  # v = n / root - y s / root
            return (x - s * root * F_x) / root.square()
        return F_x

    def as_trained(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The network's own input x_t and time t, for x = y + sigma n."""
        s = per_image(sigma, x)
        if self.prediction == "flow":
            return x / (1 + s), self.steps * (s / (1 + s)).flatten()
        return x / (1 + s.square()).sqrt(), self.timestep(sigma)

    def timestep(self, sigma: Tensor) -> Tensor:
        """The (fractional) step of the schedule with noise level `sigma` [n]."""
        log = sigma.clamp(min=1e-20).log()
        # torch.searchsorted by counting, for exports: ONNX has no such operator.
        above = (self.log_sigmas < log[:, None]).sum(1).clamp(1, len(self.log_sigmas) - 1)
        low, high = self.log_sigmas[above - 1], self.log_sigmas[above]
        return above - 1 + ((log - low) / (high - low)).clamp(0, 1)

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        """The network's own prediction, without the variance that some networks add."""
        with self._computing():
            y: Tensor = self.net(x_t, t, class_labels=self.labels(condition), return_dict=False)[0]
        return y[:, : x_t.shape[1]].to(torch.float32)

    def _computing(self) -> AbstractContextManager[Any]:
        """Cast inside the library's layers where `compute_in` says so. No cache of cast weights: one made without
        gradient would be used where there must be one.
        """
        low: torch.dtype | None = getattr(self.net, "compute", None)
        if low is None:
            return nullcontext()
        return torch.autocast(self.log_sigmas.device.type, low, cache_enabled=False)

    def labels(self, condition: Tensor | None) -> Tensor | None:
        """Class numbers for the library; DiT's embedding has one more row, which is no class."""
        if not self.num_classes:
            return None
        assert condition is not None, "a class-conditional network was called without classes"
        if condition.is_floating_point():
            condition = condition.argmax(1)
        return torch.where(condition < 0, self.num_classes, condition)

    @property
    def taps(self) -> list[str]:
        return [*diffusers_taps.blocks(self.net)]

    def features(self, x: Tensor, sigma: Tensor, condition: Tensor | None, taps: Sequence[str]) -> list[Tensor]:
        x_t, t = self.as_trained(x.to(torch.float32), sigma.to(torch.float32))
        patch = self.settings.config.get("patch_size") or 1
        grid = (x.shape[-2] // patch, x.shape[-1] // patch)
        return diffusers_taps.features(self.net, lambda: self.predict(x_t, t, condition), taps, grid=grid)
