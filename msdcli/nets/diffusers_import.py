"""Networks of the diffusers library as denoisers in sigma space: eps, v, sample and flow prediction.

The library builds the network from its configuration; the configuration is JSON and the weights safetensors, so
nothing in a folder is run. Needs the extra `diffusers`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msdcli.diffusion.denoiser import Denoiser, per_image
from msdcli.errors import UserError
from msdcli.nets import diffusers_taps
from msdcli.recipe.networks import DiffusersNetworkSettings

PARTS = {
    "unet": ("UNet2DModel", "UNet2DConditionModel"),
    "transformer": ("DiTTransformer2DModel", "SD3Transformer2DModel"),
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT = ("UNet2DConditionModel", "SD3Transformer2DModel")
FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
SCHEDULE_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


class FromDiffusers(Denoiser):
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


def build_diffusers(settings: DiffusersNetworkSettings) -> FromDiffusers:
    """Build the network of a section, with random weights."""
    library = _library()
    if "sample_size" not in settings.config or "in_channels" not in settings.config:
        raise UserError("network kind 'diffusers': config needs sample_size and in_channels")
    if settings.reads_text:
        from msdcli.nets import diffusers_text

        diffusers_text.check_section(settings)
    try:
        net = getattr(library, settings.class_name).from_config(settings.config)
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"network kind 'diffusers': no network fits this config ({error})") from None
    for module in net.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0  # DiT drops classes while training; a one-step student is told its class
    kind = diffusers_text.TextDenoiser if settings.reads_text else FromDiffusers
    return kind(net, settings, log_sigmas(settings))


def log_sigmas(settings: DiffusersNetworkSettings) -> Tensor:
    """The schedule's noise levels as logarithms, ascending."""
    if settings.prediction == "flow":
        return torch.empty(0, device="cpu")
    with torch.device("cpu"):
        alpha_bar = _library().DDPMScheduler(**settings.schedule).alphas_cumprod.double()
    levels = ((1 - alpha_bar) / alpha_bar).sqrt().log().float()
    return levels.to(torch.get_default_device())


def is_pipeline(path: Path) -> bool:
    """Whether this is a folder that diffusers saved."""
    return (path / "model_index.json").is_file()


def read_section(folder: Path) -> tuple[DiffusersNetworkSettings, Path]:
    """Return the network section of a saved pipeline and its file of weights. UserError for what is not supported."""
    index = read_index(folder)
    if "vqvae" in index:
        raise UserError(f"{folder} has a VQ autoencoder, msd knows AutoencoderKL")
    found = [(part, name) for part, names in PARTS.items() for name in names if index.get(part, [None])[1:] == [name]]
    if not found:
        known = ", ".join(f"{part}: {' or '.join(names)}" for part, names in PARTS.items())
        raise UserError(f"{folder} holds no network msd knows; it knows {known}")
    part, class_name = found[0]
    scheduler = read_object(folder / "scheduler" / "scheduler_config.json")
    flow = scheduler.get("_class_name") == FLOW_SCHEDULER
    if scheduler.get("rescale_betas_zero_snr"):
        raise UserError(
            f"{folder}: its schedule ends without any signal (rescale_betas_zero_snr), which sigma cannot say"
        )
    config = {k: v for k, v in read_object(folder / part / "config.json").items() if not k.startswith("_")}
    try:
        section = DiffusersNetworkSettings(
            class_name=class_name,  # type: ignore[arg-type]
            config=config,
            prediction="flow" if flow else scheduler.get("prediction_type", "epsilon"),
            schedule={k: scheduler[k] for k in SCHEDULE_KEYS if scheduler.get(k) is not None},
            tokens=text_part(folder, config)["tokens"] if class_name in TEXT else None,
        )
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None
    return section, folder / part / WEIGHTS


def read_index(folder: Path) -> dict[str, Any]:
    """Read model_index.json."""
    return read_object(folder / "model_index.json")


def text_part(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What text.json will say of a pipeline's text encoders, which must fit its network's configuration."""
    from msdcli.nets.text_encoder import describe

    width = config.get("joint_attention_dim") or config.get("cross_attention_dim")
    return describe(folder, read_index(folder), width or 1280)


def autoencoder_folder(folder: Path) -> Path | None:
    """Return where a saved pipeline keeps its autoencoder; None for a pixel-space pipeline."""
    return folder / "vae" if "vae" in read_index(folder) else None


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a pipeline. UserError if it is missing, damaged or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object")
    return content


def _library() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            f"networks of kind diffusers need the library ({error})", hint="pip install 'msdcli[diffusers]'"
        ) from None
    return diffusers
