"""A saved pipeline as a recipe's network section: which network it holds, and what that was trained to predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msdcli.errors import UserError
from msdcli.nets.diffusers.files import read_index, read_object, weight_files
from msdcli.nets.diffusers.text_encoder import describe, unread
from msdcli.recipe.networks import DiffusersNetworkSettings

PARTS = {
    "unet": ("UNet2DModel", "UNet2DConditionModel"),
    "transformer": ("DiTTransformer2DModel", "SD3Transformer2DModel"),
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT = ("UNet2DConditionModel", "SD3Transformer2DModel")
FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
SCHEDULE_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


def read_section(folder: Path) -> tuple[DiffusersNetworkSettings, list[Path]]:
    """Return the network section of a saved pipeline and its files of weights, mostly one. UserError for what is not
    supported.
    """
    index = read_index(folder)
    if "vqvae" in index:
        raise UserError(f"{folder} has a VQ autoencoder, msd knows AutoencoderKL")
    found = [(part, name) for part, names in PARTS.items() for name in names if index.get(part, [None])[1:] == [name]]
    if not found:
        raise UserError(_unknown(folder, index))
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
    return section, weight_files(folder / part / WEIGHTS)


def _unknown(folder: Path, index: dict[str, Any]) -> str:
    """Say which pipeline was found, what msd reads, and what of the pipeline it lacks."""
    known = ", ".join(f"{part}: {' or '.join(names)}" for part, names in PARTS.items())
    networks = {part: str(index[part][1]) for part in (*PARTS, "prior") if _is_part(index.get(part))}
    name = index.get("_class_name")
    held = ", ".join(f"{part}: {network}" for part, network in networks.items())
    found = f"{name if isinstance(name, str) else 'a pipeline'} ({held or 'no network'})"
    lacks = [f"the network {network}" for network in networks.values()]
    if encoders := unread(index):
        lacks.append(f"prompts by {' and '.join(encoders)} {'together' if len(encoders) > 1 else 'alone'}")
    if _is_part(index.get("vae")) and index["vae"][1] != "AutoencoderKL":
        lacks.append(f"the autoencoder {index['vae'][1]}")
    missing = f"; it lacks {', '.join(lacks)}" if lacks else ""
    return f"{folder} is {found}, which msd does not read; it reads {known}{missing}"


def _is_part(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)


def text_part(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What text.json will say of a pipeline's text encoders, which must fit its network's configuration."""
    width = config.get("joint_attention_dim") or config.get("cross_attention_dim")
    return describe(folder, read_index(folder), width or 1280)
