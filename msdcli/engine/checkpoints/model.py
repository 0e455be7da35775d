"""A denoiser on disk: its weights as safetensors and what they are as JSON; the JSON comes last."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from msdcli import nets, records
from msdcli.diffusion.denoiser import Denoiser
from msdcli.engine.checkpoints.tensors import check_fit, load_tensors, load_weights, save_tensors, tensor_shapes
from msdcli.errors import MissingFileError, UserError
from msdcli.nets.adapters import AdaptedDenoiser
from msdcli.nets.meta import on_meta
from msdcli.recipe.networks import Network, NetworkSettings
from msdcli.recipe.student import AdapterSettings
from msdcli.rundir import file_hash, write_json

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
        **({"adapter": _adapter_record(net)} if isinstance(net, AdaptedDenoiser) else {}),
    }
    write_json(folder / MODEL, description | record)


def _adapter_record(net: AdaptedDenoiser) -> dict[str, Any]:
    """What adapters need to be a network again: their settings, and which base they belong to."""
    return net.adapter.model_dump(mode="json") | {"base_sha256": net.base_sha256}


def load_model(folder: Path, base: Callable[[], Denoiser] | None = None) -> tuple[Denoiser, dict[str, Any]]:
    """Read a denoiser and its description. UserError if a file is missing, damaged, or another than was written.

    A description may claim any size: the network has no memory until its file's shapes have been compared. Of adapters
    only they are read; `base` gives the network that they belong to, whose memory theirs then is.
    """
    if not (folder / MODEL).is_file():
        raise MissingFileError(f"no model at {folder}: {MODEL} is missing")
    description, weights = records.model(folder / MODEL), folder / WEIGHTS
    shapes = tensor_shapes(weights)
    sha256 = file_hash(weights)
    if description.get("sha256", sha256) != sha256:
        raise UserError(f"{weights} is not the file that {MODEL} describes: its hash differs")
    _check_extent(description["network"], len(shapes), folder / MODEL)
    with on_meta():
        check_fit(_built(description, folder / MODEL), shapes, weights)
    net = _built(description, folder / MODEL, _base(description, base, folder))
    load_weights(net, load_tensors(weights)[0], weights)
    net.read_from = sha256
    return net.requires_grad_(False).eval(), description | {"sha256": sha256}


def is_whole(folder: Path) -> bool:
    """Whether a folder holds a finished model, whose weights are those that it describes."""
    with contextlib.suppress(UserError):
        return is_complete(folder) and load_model(folder) is not None
    return False


def described(folder: Path) -> dict[str, Any]:
    """Return the description of a model with the hash of its weights, which others' may lack."""
    found = records.model(folder / MODEL)
    return found if "sha256" in found else found | {"sha256": file_hash(folder / WEIGHTS)}


def predicts(description: dict[str, Any]) -> list[Any]:
    """What a model.json says that its predictions depend on: equal weights in another network are another teacher."""
    return [description.get(name) for name in ("network", "shape", "num_classes", "sigma_data", "sha256")]


def _base(description: Mapping[str, Any], base: Callable[[], Denoiser] | None, folder: Path) -> Denoiser | None:
    """Return the network that adapters belong to, None for a network of its own. UserError where it is another."""
    if "adapter" not in description:
        return None
    if base is None:
        raise UserError(f"{folder} holds adapters, which are no network without the one that they were trained on")
    found, wanted = base(), description["adapter"].get("base_sha256")
    if wanted != found.read_from:
        raise UserError(f"{folder} holds adapters of another network: their base has the hash {str(wanted)[:16]}")
    return found


def _built(description: Mapping[str, Any], path: Path, base: Denoiser | None = None) -> Denoiser:
    """Build the network of a description that may come from anywhere; adapters on `base`, if that is here."""
    try:
        network = TypeAdapter[NetworkSettings](Network).validate_python(description["network"])
        how = {"num_classes": description["num_classes"], "sigma_data": description["sigma_data"]}
        net = nets.build(network, shape=tuple(description["shape"]), **how) if base is None else base
        if (adapter := description.get("adapter")) is not None:
            settings = {name: adapter[name] for name in AdapterSettings.model_fields}
            net = AdaptedDenoiser(net, AdapterSettings.model_validate(settings))
        net.anchor = float(description.get("anchor", 0.0))
        return net
    except UserError as error:
        raise UserError(f"{path}: {error.message}", hint=error.hint) from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RuntimeError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} does not describe a network msd knows: {said}") from None


def _check_extent(value: Any, num_tensors: int, path: Path, name: str = "network") -> None:
    """Refuse what would be built for ever: more layers than the file has tensors, or sides of millions of pixels."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_extent(inner, num_tensors, path, str(key))
    elif isinstance(value, list):
        if len(value) > max(64, num_tensors):
            raise UserError(
                f"{path}: {name[:80]} is a list of {len(value):,}, and the file has {num_tensors:,} tensors"
            )
        for inner in value:
            _check_extent(inner, num_tensors, path, name)
    elif isinstance(value, int):
        counted = "layers" in name or "blocks" in name
        most = max(64, num_tensors) if counted else 4096 if name.endswith(("sample_size", "_max_size")) else 2**24
        if abs(value) > most:
            raise UserError(f"{path}: {name[:80]} is {value:,}; at most {most:,} would fit this file")


def is_complete(folder: Path) -> bool:
    """Whether a model was written here and finished."""
    return (folder / MODEL).is_file() and (folder / WEIGHTS).is_file()
