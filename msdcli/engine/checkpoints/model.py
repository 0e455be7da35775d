"""A denoiser on disk: its weights as safetensors and what they are as JSON; the JSON comes last."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from msdcli import nets
from msdcli.diffusion.denoiser import Denoiser
from msdcli.engine.checkpoints.tensors import load_tensors, load_weights, save_tensors
from msdcli.errors import UserError
from msdcli.recipe.networks import Network, NetworkSettings
from msdcli.rundir import file_hash, read_json, write_json

WEIGHTS, MODEL = "model.safetensors", "model.json"
FORMAT = 1


def save_model(
    folder: Path, net: Denoiser, record: dict[str, Any], tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write a denoiser as model.safetensors and model.json; the JSON comes last and makes the folder complete.

    `tensors` are its whole ones, where the network is sharded.
    """
    save_tensors(folder / WEIGHTS, net.state_dict() if tensors is None else tensors)
    description = {
        "format": FORMAT,
        "network": net.settings.model_dump(mode="json"),
        "shape": list(net.shape),
        "num_classes": net.num_classes,
        "sigma_data": net.sigma_data,
        "parameters": sum(p.numel() for p in net.parameters()),
        "sha256": file_hash(folder / WEIGHTS),
        **({"anchor": net.anchor} if net.anchor else {}),
    }
    write_json(folder / MODEL, description | record)


def load_model(folder: Path) -> tuple[Denoiser, dict[str, Any]]:
    """Read a denoiser and its description. UserError if a file is missing, damaged, or another than was written."""
    if not (folder / MODEL).is_file():
        raise UserError(f"no model at {folder}: {MODEL} is missing")
    description = read_json(folder / MODEL)
    try:
        network = TypeAdapter[NetworkSettings](Network).validate_python(description["network"])
        shape, classes = tuple(description["shape"]), description["num_classes"]
        net = nets.build(network, shape=shape, num_classes=classes, sigma_data=description["sigma_data"])
        if "anchor" in description:
            net.anchor = float(description["anchor"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / MODEL} does not describe a network msd knows: {error}") from None
    tensors, _ = load_tensors(folder / WEIGHTS)
    if description.get("sha256") not in (None, file_hash(folder / WEIGHTS)):
        raise UserError(f"{folder / WEIGHTS} is not the file that {MODEL} describes: its hash differs")
    load_weights(net, tensors, folder / WEIGHTS)
    return net.requires_grad_(False).eval(), description


def is_complete(folder: Path) -> bool:
    """Whether a model was written here and finished."""
    return (folder / MODEL).is_file() and (folder / WEIGHTS).is_file()
